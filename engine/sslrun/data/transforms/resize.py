from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sslrun.data.transforms.base import Box, Numbers, box_in_words, dali_types, pair_of_pixels
from sslrun.data.transforms.enlarging import enlarged_window
from sslrun.data.transforms.resampling import Interpolation, Resampling

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

_LARGE = 2**22  # pixels of a resized image above which only the part that is kept is made


class Resize(Resampling):
    """Resizes the whole image.

    Before a crop, only the part that the crop keeps is made of a very large result.

    Args:
        size: the shorter side in pixels (the longer one keeps the aspect ratio, rounded down), or height and width.
        interpolation: interpolation of the resize, "bilinear" or "bicubic"; both filter before shrinking, as in PIL.
        p: probability of resizing an image; other images keep their size.
    """

    # Its numbers, besides the box: `to` (N, 2), the size of the whole result; `start` (N, 2), top and left of the part
    # of it that is made, whose size is that of the numbers.

    def __init__(self, size: int | list[int], interpolation: Interpolation = "bilinear", p: float = 1.0) -> None:
        super().__init__(interpolation=interpolation, p=p)
        self.short_side = size if isinstance(size, int) else None
        self.size = pair_of_pixels("size", size)

    def boxes(self, uniforms: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        box = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
        if self.short_side is None:
            return box, np.broadcast_to(self.size, sizes.shape)
        short = sizes.min(axis=1, keepdims=True)
        # In this order and in floating point: torchvision's int(size * long / short).
        return box, np.where(sizes == short, self.short_side, (self.short_side * sizes / short).astype(np.int64))

    def size_when_applied(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if self.short_side is None:
            return self.size
        if size is None:
            return None
        height, width = self.boxes(np.empty((1, 0)), np.array([size]))[1][0]
        return int(height), int(width)

    def numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> Numbers:
        numbers = super().numbers(uniforms, sizes)
        numbers.values |= {"to": numbers.size, "start": np.zeros_like(numbers.size)}
        return numbers

    def before_crop(self, numbers: Numbers, crop: Numbers) -> tuple[Numbers, Numbers]:
        """The numbers of a resize and of the crop after it, such that no large image is made of which the crop keeps
        little. The views stay the same."""
        size, kept = numbers.size.astype(np.int64), crop.size.astype(np.int64)
        is_large = (size.prod(axis=1) > np.maximum(_LARGE, 4 * kept.prod(axis=1))) & numbers.apply & crop.apply
        is_large &= (size >= numbers["box"][:, 2:]).all(axis=1)
        if not is_large.any():
            return numbers, crop
        top_left = np.clip(crop["start"], 0, size)
        part = np.minimum(crop["start"] + kept, size) - top_left
        chosen = is_large[:, None]
        start = np.where(chosen, top_left, 0).astype(np.int32)
        made = Numbers(numbers.apply, np.where(chosen, part, size).astype(np.int32), numbers.values | {"start": start})
        return made, Numbers(crop.apply, crop.size, crop.values | {"start": (crop["start"] - start).astype(np.int32)})

    def torch_image(self, image: Tensor, numbers: Numbers) -> Tensor:
        to, size, start = (tuple(pair.tolist()) for pair in (numbers["to"], numbers.size, numbers["start"]))
        if to == size:
            return super().torch_image(image, numbers)
        return enlarged_window(image, to, start, size, self.interpolation)

    def dali_arguments(self, numbers: Numbers) -> dict[str, np.ndarray]:
        names = {**dict(zip(("from", "until"), _region(numbers), strict=True)), "size": numbers.size}
        return {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in names.items()}

    def dali(self, image: Any, nodes: dict[str, Any]) -> Any:
        from nvidia.dali import fn

        types = dali_types()
        kinds = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
        region = {"roi_start": nodes["from"], "roi_end": nodes["until"]}
        return fn.resize(image, size=nodes["size"], interp_type=kinds[self.interpolation], antialias=True, **region)

    def pil(self, image: Image.Image, numbers: Numbers) -> Image.Image:
        from PIL import Image

        filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
        (top, left), (bottom, right) = (place.tolist() for place in _region(numbers))
        rows, columns = numbers.size.tolist()
        return image.resize((columns, rows), filters[self.interpolation], (left, top, right, bottom))

    def describe(self, numbers: Numbers) -> dict[str, Any]:
        return box_in_words(numbers["box"].tolist()) | {"to_px": numbers["to"].tolist()}

    def part_shown(self, numbers: Numbers, size: tuple[int, int]) -> Box | None:
        (top, left), (bottom, right) = (place.tolist() for place in _region(numbers))
        return top, left, bottom - top, right - left


def _region(numbers: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Top left and bottom right of the part that is made, in pixels of the entering image, (N, 2) or (2,)."""
    old, ends = numbers["box"][..., 2:].astype(np.int64), (numbers["start"], numbers["start"] + numbers.size)
    top_left, bottom_right = (end * old / numbers["to"] for end in ends)  # in this order: exact for the whole
    return top_left, bottom_right
