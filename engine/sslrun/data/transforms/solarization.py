from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sslrun.data.operations import SOLARIZE, Operation, applied
from sslrun.data.transforms.base import Numbers, Transform, dali_types
from sslrun.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


class Solarization(Transform):
    """Inverts values at or above a threshold.

    Args:
        threshold: smallest value that is inverted, 0 to 255.
        p: probability of solarizing an image.
    """

    ignores_flips = True
    dali_frames = True

    def __init__(self, threshold: int = 128, p: float = 0.2) -> None:
        super().__init__(p=p)
        if not 0 <= threshold <= 255:
            raise UsageError(f"threshold must lie between 0 and 255, not {threshold}")
        self.threshold = threshold

    def torch_block(self, x: Tensor, numbers: Numbers) -> Tensor:
        """255 - x where x is at the threshold or above."""
        import torch

        inverted = (x - (self.threshold - 1.0)).clamp_(0.0, 1.0)
        return x.add_(inverted.mul_(torch.mul(x, -2.0).add_(255.0)))

    def operations(self, numbers: Numbers) -> list[Operation]:
        return [applied(SOLARIZE, numbers.apply, self.threshold)]

    def dali_arguments(self, numbers: Numbers) -> dict[str, np.ndarray]:
        return {"apply": numbers.apply.astype(np.float32)}

    def dali(self, image: Any, nodes: dict[str, Any]) -> Any:
        from nvidia.dali import fn

        # 255 - x differs from x in every bit.
        bits = [0 if value < self.threshold else 255 for value in range(256)]
        inverted = fn.lookup_table(image, keys=list(range(256)), values=bits, dtype=dali_types().UINT8)
        return image ^ fn.brightness_contrast(inverted, brightness=nodes["apply"])

    def pil(self, image: Image.Image, numbers: Numbers) -> Image.Image:
        from PIL import ImageOps

        return ImageOps.solarize(image, self.threshold)

    def describe(self, numbers: Numbers) -> dict[str, Any]:
        return {"threshold": self.threshold}
