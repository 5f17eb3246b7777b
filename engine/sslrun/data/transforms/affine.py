"""Affine maps of an image with bicubic interpolation, as in PIL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def affine(image: Tensor, matrix: Sequence[float], fill: Sequence[int]) -> Tensor:
    """An image of the same size whose pixels come from other places; bicubic, as in Pillow's Geometry.c.

    Args:
        image: (1, C, H, W) uint8.
        matrix: a to f. The pixel at column x and row y comes from column a x + b y + c and row d x + e y + f, where the
            center of the first pixel is at 0.5, 0.5.
        fill: value of each channel where that is outside of the image.
    """
    import torch

    a, b, c, d, e, f = matrix
    height, width = image.shape[-2:]
    x = torch.arange(width, dtype=torch.float64, device=image.device) + 0.5
    y = (torch.arange(height, dtype=torch.float64, device=image.device) + 0.5).unsqueeze(1)
    column, row = a * x + b * y + c, d * x + e * y + f
    outside = (column < 0) | (column >= width) | (row < 0) | (row >= height)
    column, row = column - 0.5, row - 0.5
    left, top = column.floor(), row.floor()
    right, down = column - left, row - top  # the distance from there, 0 to 1
    columns = [(left.long() + step).clamp(0, width - 1) for step in (-1, 0, 1, 2)]
    rows = [(top.long() + step).clamp(0, height - 1) for step in (-1, 0, 1, 2)]
    pixels = image[0].double().flatten(1)

    def line(of_row: Tensor) -> Tensor:
        """(C, H, W): interpolated along one of the four rows."""
        return _bicubic([pixels[:, of_row * width + of_column] for of_column in columns], right)

    value = _bicubic([line(of_row) for of_row in rows], down).clamp(0, 255).to(torch.uint8)
    empty = torch.cat([torch.full_like(value[:1], level) for level in fill])
    return torch.where(outside, empty, value).unsqueeze(0)


def _bicubic(v: Sequence[Tensor], t: Tensor) -> Tensor:
    """Between the second and the third of four values, at `t` from the second."""
    p2 = v[2] - v[0]
    p3 = 2 * (v[0] - v[1]) + v[2] - v[3]
    p4 = v[1] - v[0] - v[2] + v[3]
    return v[1] + t * (p2 + t * (p3 + t * p4))
