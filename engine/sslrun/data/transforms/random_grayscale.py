from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sslrun.data.operations import GRAY, Operation, applied
from sslrun.data.transforms.base import Numbers, Transform, dali_types
from sslrun.data.transforms.color_jitter import LUMA, gray
from sslrun.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


class RandomGrayscale(Transform):
    """Sets every channel to the gray value of the pixel.

    Args:
        p: probability of turning an image gray.
    """

    ignores_flips = True
    dali_frames = True

    def __init__(self, p: float = 0.1) -> None:
        super().__init__(p=p)

    def check_channels(self, channels: int) -> None:
        if channels != 3:
            raise UsageError(f"RandomGrayscale takes red, green and blue, and the images have {channels} channels")

    def torch_block(self, x: Tensor, numbers: Numbers) -> Tensor:
        return x.copy_(gray(x)[:, None])

    def operations(self, numbers: Numbers) -> list[Operation]:
        return [applied(GRAY, numbers.apply)]

    def dali_arguments(self, numbers: Numbers) -> dict[str, np.ndarray]:
        matrices = np.where(numbers.apply[:, None, None], np.array([LUMA] * 3), np.eye(3))
        return {"matrix": matrices.astype(np.float32)}

    def dali(self, image: Any, nodes: dict[str, Any]) -> Any:
        from nvidia.dali import fn

        return fn.coord_transform(image, M=nodes["matrix"], dtype=dali_types().UINT8)

    def pil(self, image: Image.Image, numbers: Numbers) -> Image.Image:
        return image.convert("L").convert("RGB")
