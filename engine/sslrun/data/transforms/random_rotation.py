from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sslrun.data.transforms.base import Numbers, Transform, dali_types, within
from sslrun.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


class RandomRotation(Transform):
    """Rotates the image about its center by a random angle, with the nearest pixel; empty corners are black.

    Args:
        degrees: largest rotation in either direction, or smallest and largest counter-clockwise rotation, in degrees.
        p: probability of rotating an image.
    """

    num_draws = 2
    geometric = True

    def __init__(self, degrees: float | list[float], p: float = 1.0) -> None:
        super().__init__(p=p)
        if not isinstance(degrees, Sequence) and degrees < 0:
            raise UsageError(f"degrees must be 0 or more, or [smallest, largest], not {degrees}")
        both_ends = degrees if isinstance(degrees, Sequence) else [-degrees, degrees]
        self.degrees = within("degrees", both_ends, -360.0, 360.0)

    def numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> Numbers:
        """Its numbers: `affine` (N, 6), a to f. The pixel at column x and row y comes from column a x + b y + c and row
        d x + e y + f, where the center of the first pixel is at 0.5, 0.5."""
        apply = uniforms[:, 0] < self.p
        turns = np.radians(self.degrees[0] + uniforms[:, 1] * (self.degrees[1] - self.degrees[0]))
        cosine, sine = (np.round(f(np.where(apply, turns, 0.0)), 15) for f in (np.cos, np.sin))  # as in PIL
        y, x = sizes.T / 2.0
        columns = cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y
        return Numbers(apply, sizes, {"affine": np.stack(columns, axis=1)})

    def torch_image(self, image: Tensor, numbers: Numbers) -> Tensor:
        """Places are counted in 65536ths of a pixel, as in Pillow's Geometry.c."""
        import torch

        a, b, c, d, e, f = numbers["affine"].tolist()
        _, _, height, width = image.shape
        x, y = torch.arange(width, device=image.device), torch.arange(height, device=image.device).unsqueeze(1)

        def place(slope_x: float, slope_y: float, start: float) -> Tensor:
            first, by_x, by_y = (
                math.floor(65536.0 * v + 0.5) for v in (start + slope_x * 0.5 + slope_y * 0.5, slope_x, slope_y)
            )
            return ((first + by_y * y) + by_x * x) >> 16

        column, row = place(a, b, c), place(d, e, f)
        outside = (column < 0) | (column >= width) | (row < 0) | (row >= height)
        source = (row * width + column).masked_fill_(outside, height * width).flatten()
        channels = image.shape[1]
        pixels = torch.cat([image.permute(0, 2, 3, 1).reshape(-1, channels), image.new_zeros(1, channels)])
        return pixels.index_select(0, source).view(1, height, width, channels).permute(0, 3, 1, 2)

    def dali_arguments(self, numbers: Numbers) -> dict[str, np.ndarray]:
        return {"affine": numbers["affine"].astype(np.float32)}

    def dali(self, image: Any, nodes: dict[str, Any]) -> Any:
        from nvidia.dali import fn

        types = dali_types()
        matrix = fn.reshape(nodes["affine"], shape=[2, 3])  # from the result to the image: DALI's default
        return fn.warp_affine(image, matrix=matrix, interp_type=types.INTERP_NN, fill_value=0)

    def pil(self, image: Image.Image, numbers: Numbers) -> Image.Image:
        return image.rotate(self._degrees(numbers))

    def describe(self, numbers: Numbers) -> dict[str, Any]:
        return {"counter_clockwise_degrees": self._degrees(numbers)}

    def _degrees(self, numbers: Numbers) -> float:
        a, b, *_ = numbers["affine"].tolist()
        return math.degrees(math.atan2(-b, a))
