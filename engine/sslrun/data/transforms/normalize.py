from collections.abc import Sequence

import numpy as np

from sslrun.data.transforms.base import Numbers, Transform
from sslrun.errors import UsageError


class Normalize(Transform):
    """Computes (x / 255 - mean) / std for each channel. It comes last in its list, except for a flip.

    Without it, pixels are x / 255.

    Args:
        mean: means of R, G and B (of each channel of images that are not RGB), for pixels from 0 to 1.
        std: standard deviations of the same channels, for pixels from 0 to 1.
    """

    num_draws = 0

    def __init__(
        self, mean: Sequence[float] = (0.485, 0.456, 0.406), std: Sequence[float] = (0.229, 0.224, 0.225)
    ) -> None:
        super().__init__()
        if not mean or len(mean) != len(std) or min(std) <= 0:
            raise UsageError("mean and std must each have a number for each channel, those of std above 0")
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))

    def steps(self) -> list[Transform]:
        """None: it changes no bytes. The exact stage normalizes where it makes bytes into floats."""
        return []

    def step_numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> list[Numbers]:
        return []
