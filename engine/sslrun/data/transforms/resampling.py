"""What crops that resize and resizes share: a box of the image becomes an image of a new size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sslrun.data.transforms.base import Box, Numbers, Transform, box_in_words, dali_types, size_with_probability
from sslrun.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]


class Resampling(Transform, listed=False):
    """Base of transforms that resize a box of the image. Its numbers: `box` (N, 4), top, left, height, width."""

    geometric = True

    def __init__(self, *, interpolation: Interpolation, p: float) -> None:
        super().__init__(p=p)
        if interpolation not in ("bilinear", "bicubic"):
            raise UsageError(f'interpolation must be "bilinear" or "bicubic", not {interpolation!r}')
        self.interpolation = interpolation

    def boxes(self, uniforms: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Box (N, 4) and new size (N, 2) of images to which the transform applies."""
        raise NotImplementedError

    def size_when_applied(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        """`output_size` of images to which the transform applies."""
        raise NotImplementedError

    def numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> Numbers:
        apply = uniforms[:, 0] < self.p
        box, size = self.boxes(uniforms[:, 1:], sizes.astype(np.int64))
        whole = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
        return Numbers(
            apply,
            np.where(apply[:, None], size, sizes).astype(np.int32),
            {"box": np.where(apply[:, None], box, whole).astype(np.int32)},
        )

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        return size_with_probability(self.p, self.size_when_applied(size), size)

    def torch_image(self, image: Tensor, numbers: Numbers) -> Tensor:
        """Filters as PIL does: the filter sees only the box."""
        import torch

        top, left, height, width = numbers["box"].tolist()
        rows, columns = numbers.size.tolist()
        crop = image[..., top : top + height, left : left + width]
        # A third of the time would go with the gaps between the rows of a view.
        crop = crop.contiguous(memory_format=torch.channels_last)
        # Pillow's rule since version 13: the height goes first where it shrinks by more than twice what the width does.
        if height - rows > max(0, 2 * (width - columns)):
            crop = _interpolate(crop, rows, width, self.interpolation)
        return _interpolate(crop, rows, columns, self.interpolation)

    def dali_arguments(self, numbers: Numbers) -> dict[str, np.ndarray]:
        box = numbers["box"]
        return {
            "start": box[:, :2].astype(np.int32),
            "shape": box[:, 2:].astype(np.int32),
            "size": numbers.size.astype(np.float32),
        }

    def dali(self, image: Any, nodes: dict[str, Any]) -> Any:
        from nvidia.dali import fn

        types = dali_types()
        kinds = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
        # Cut first: a filter that reads beyond the box would see pixels that PIL's does not.
        crop = fn.slice(image, start=nodes["start"], shape=nodes["shape"], axes=[0, 1])
        return fn.resize(crop, size=nodes["size"], interp_type=kinds[self.interpolation], antialias=True)

    def pil(self, image: Image.Image, numbers: Numbers) -> Image.Image:
        from PIL import Image

        filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
        top, left, height, width = numbers["box"].tolist()
        rows, columns = numbers.size.tolist()
        crop = image.crop((left, top, left + width, top + height))
        return crop.resize((columns, rows), filters[self.interpolation])

    def describe(self, numbers: Numbers) -> dict[str, Any]:
        return box_in_words(numbers["box"].tolist()) | {"to_px": numbers.size.tolist()}

    def part_shown(self, numbers: Numbers, size: tuple[int, int]) -> Box | None:
        top, left, height, width = map(float, numbers["box"])
        return top, left, height, width


def _interpolate(image: Tensor, rows: int, columns: int, interpolation: str) -> Tensor:
    import torch.nn.functional as F

    if image.shape[2:] == (rows, columns):
        return image
    return F.interpolate(image, (rows, columns), mode=interpolation, align_corners=False, antialias=True)
