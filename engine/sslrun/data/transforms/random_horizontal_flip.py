from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sslrun.data.operations import FLIP, Operation, applied
from sslrun.data.transforms.base import Box, Numbers, Transform

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


class RandomHorizontalFlip(Transform):
    """Mirrors the image horizontally.

    Args:
        p: probability of flipping an image.
    """

    geometric = True
    is_flip = True
    ignores_flips = True

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p=p)

    def torch_image(self, image: Tensor, numbers: Numbers) -> Tensor:
        return image.flip(-1)

    def torch_block(self, x: Tensor, numbers: Numbers) -> Tensor:
        return x.flip(-1)

    def operations(self, numbers: Numbers) -> list[Operation]:
        return [applied(FLIP, numbers.apply)]

    def dali_arguments(self, numbers: Numbers) -> dict[str, np.ndarray]:
        return {"apply": numbers.apply.astype(np.int32)}

    def dali(self, image: Any, nodes: dict[str, Any]) -> Any:
        from nvidia.dali import fn

        return fn.flip(image, horizontal=nodes["apply"])

    def pil(self, image: Image.Image, numbers: Numbers) -> Image.Image:
        from PIL import ImageOps

        return ImageOps.mirror(image)

    def part_shown(self, numbers: Numbers, size: tuple[int, int]) -> Box | None:
        return 0.0, float(size[1]), float(size[0]), -float(size[1])
