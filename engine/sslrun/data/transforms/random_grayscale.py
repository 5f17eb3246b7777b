from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sslrun.data.operations import GRAY, Operation, applied
from sslrun.data.transforms.base import Numbers, Transform, dali_types
from sslrun.data.transforms.color_jitter import dali_gray, gray

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


class RandomGrayscale(Transform):
    """Sets every channel to the gray value of the pixel.

    Args:
        p: probability of turning an image gray.
    """

    ignores_flips = True

    def __init__(self, p: float = 0.1) -> None:
        super().__init__(p=p)

    def torch_block(self, x: Tensor, numbers: Numbers) -> Tensor:
        return x.copy_(gray(x)[:, None])

    def operations(self, numbers: Numbers) -> list[Operation]:
        return [applied(GRAY, numbers.apply)]

    def dali(self, image: Any, nodes: dict[str, Any]) -> Any:
        from nvidia.dali import fn

        types = dali_types()
        if nodes["apply"]:
            image = fn.color_space_conversion(dali_gray(image), image_type=types.GRAY, output_type=types.RGB)
        return image

    def pil(self, image: Image.Image, numbers: Numbers) -> Image.Image:
        return image.convert("L").convert("RGB")
