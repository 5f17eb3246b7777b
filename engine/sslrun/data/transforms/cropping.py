"""What crops without a resize share: a window of the image; black where it reaches beyond the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sslrun.data.transforms.base import (
    Box,
    Numbers,
    Transform,
    box_in_words,
    pair_of_pixels,
    size_with_probability,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


class Cropping(Transform, listed=False):
    """Base of crops. Its numbers: `start` (N, 2), top and left of the window, negative where black is added.

    Args:
        size: height and width in pixels; one number for a square.
        p: probability of cropping an image; other images keep their size.
    """

    geometric = True

    def __init__(self, size: int | list[int], p: float = 1.0) -> None:
        super().__init__(p=p)
        self.size = pair_of_pixels("size", size)

    def starts(self, uniforms: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Top and left (N, 2) of the windows of images to which the transform applies."""
        raise NotImplementedError

    def numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> Numbers:
        apply = uniforms[:, :1] < self.p
        start = np.where(apply, self.starts(uniforms[:, 1:], sizes.astype(np.int64)), 0).astype(np.int32)
        return Numbers(apply[:, 0], np.where(apply, self.size, sizes).astype(np.int32), {"start": start})

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        return size_with_probability(self.p, self.size, size)

    def torch_image(self, image: Tensor, numbers: Numbers) -> Tensor:
        import torch.nn.functional as F

        (top, left), (height, width) = numbers["start"].tolist(), numbers.size.tolist()
        _, _, old_height, old_width = image.shape
        if top >= 0 and left >= 0 and top + height <= old_height and left + width <= old_width:
            return image[..., top : top + height, left : left + width]
        return F.pad(image, (-left, left + width - old_width, -top, top + height - old_height))

    def dali_arguments(self, numbers: Numbers) -> dict[str, np.ndarray]:
        return {"start": numbers["start"], "size": numbers.size}

    def dali(self, image: Any, nodes: dict[str, Any]) -> Any:
        from nvidia.dali import fn

        return fn.slice(
            image,
            start=nodes["start"],
            shape=nodes["size"],
            axes=[0, 1],
            out_of_bounds_policy="pad",
            fill_values=0,
        )

    def pil(self, image: Image.Image, numbers: Numbers) -> Image.Image:
        (top, left), (height, width) = numbers["start"].tolist(), numbers.size.tolist()
        return image.crop((left, top, left + width, top + height))

    def describe(self, numbers: Numbers) -> dict[str, Any]:
        return box_in_words([*numbers["start"], *numbers.size])

    def part_shown(self, numbers: Numbers, size: tuple[int, int]) -> Box | None:
        (top, left), (height, width) = map(float, numbers["start"]), map(float, numbers.size)
        return top, left, height, width
