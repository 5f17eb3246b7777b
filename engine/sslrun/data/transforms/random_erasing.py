from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sslrun.data.transforms.base import Numbers, Transform, box_in_words, within
from sslrun.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

_TRIES = 10


class RandomErasing(Transform):
    """Replaces a rectangle of the image by noise.

    Zhong et al. 2020 (arXiv 1708.04896), in the form of the fine-tuning of MAE and BEiT: each pixel is drawn from a
    normal distribution with the mean and standard deviation of the data set, and cut to whole numbers from 0 to 255. Of
    ten rectangles, the first that leaves a row and a column is taken.

    Args:
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest ratio of height and width, which is log-uniform.
        mean: mean of the noise in each channel, 0 to 1.
        std: standard deviation of the noise in each channel, 0 to 1; 0 for a rectangle of one color.
        p: probability of erasing a part of an image.
    """

    num_draws = 1 + 2 * _TRIES + 3

    def __init__(
        self,
        scale: tuple[float, float] = (0.02, 1 / 3),
        ratio: tuple[float, float] = (0.3, 1 / 0.3),
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        p: float = 0.25,
    ) -> None:
        super().__init__(p=p)
        self.scale = within("scale", scale, 0.0, 1.0)
        self.ratio = within("ratio", ratio, 1e-3, 1e3)
        for name, values in (("mean", mean), ("std", std)):
            if not all(0 <= value <= 1 for value in values):
                raise UsageError(f"{name} must be numbers from 0 to 1, not {list(values)}")
        self.mean, self.std = list(mean), list(std)

    def check_channels(self, channels: int) -> None:
        if channels != len(self.mean):
            raise UsageError(f"RandomErasing fills {len(self.mean)} channels, and the images have {channels}")

    def numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> Numbers:
        """Its numbers: `box` (N, 4), top, left, height and width in pixels, and `key` (N,), of the noise."""
        tries = uniforms[:, 1 : 1 + 2 * _TRIES].reshape(len(uniforms), _TRIES, 2)
        area = (self.scale[0] + tries[..., 0] * (self.scale[1] - self.scale[0])) * sizes.prod(axis=1, keepdims=True)
        low, high = (math.log(end) for end in self.ratio)
        aspect = np.exp(low + tries[..., 1] * (high - low))
        sides = np.rint(np.sqrt(np.stack([area * aspect, area / aspect], axis=-1))).astype(np.int64)
        fits = (sides < sizes[:, None]).all(axis=2)
        first = fits.argmax(axis=1)
        chosen = np.where(fits.any(axis=1)[:, None], sides[np.arange(len(sides)), first], 0)
        corner = np.floor(uniforms[:, -3:-1] * (sizes - chosen + 1)).astype(np.int64)
        apply = (uniforms[:, 0] < self.p) & (chosen > 0).all(axis=1)
        box = np.where(apply[:, None], np.concatenate([corner, chosen], axis=1), 0)
        return Numbers(apply, sizes, {"box": box, "key": np.floor(uniforms[:, -1] * 2**32).astype(np.int64)})

    def torch_block(self, x: Tensor, numbers: Numbers) -> Tensor:
        import torch

        for row, (box, key) in enumerate(zip(numbers["box"].tolist(), numbers["key"].tolist(), strict=True)):
            top, left, height, width = box
            noise = torch.from_numpy(self._noise(height, width, key)).to(x.device, x.dtype, non_blocking=True)
            x[row, :, top : top + height, left : left + width] = noise.permute(2, 0, 1)
        return x

    def pil(self, image: Image.Image, numbers: Numbers) -> Image.Image:
        from PIL import Image

        top, left, height, width = numbers["box"].tolist()
        result = image.copy()
        result.paste(Image.fromarray(self._noise(height, width, int(numbers["key"]))), (left, top))
        return result

    def describe(self, numbers: Numbers) -> dict[str, Any]:
        return box_in_words(numbers["box"].tolist())

    def _noise(self, height: int, width: int, key: int) -> np.ndarray:
        """(height, width, C) uint8."""
        normal = np.random.Generator(np.random.Philox(key=key)).standard_normal((height, width, len(self.mean)))
        return np.clip(255 * (np.array(self.mean) + np.array(self.std) * normal) + 0.5, 0, 255).astype(np.uint8)
