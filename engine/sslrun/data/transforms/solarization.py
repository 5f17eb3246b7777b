from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

    def dali(self, image: Any, nodes: dict[str, Any]) -> Any:
        from nvidia.dali import fn

        types = dali_types()
        table = [value if value < self.threshold else 255 - value for value in range(256)]
        if nodes["apply"]:
            image = fn.lookup_table(image, keys=list(range(256)), values=table, dtype=types.UINT8)
        return image

    def pil(self, image: Image.Image, numbers: Numbers) -> Image.Image:
        from PIL import ImageOps

        return ImageOps.solarize(image, self.threshold)

    def describe(self, numbers: Numbers) -> dict[str, Any]:
        return {"threshold": self.threshold}
