"""A window of an enlarged image, without the rest of it: the bytes that torch's `interpolate` gives there.

A shorter side of 256 pixels makes 15,360,000 x 256 of an image of 60,000 x 1, of which a center crop keeps 224 x 224.
torch cannot be asked for a part. Its arithmetic for bytes is Pillow's: columns first, then rows, each pixel a sum with
weights of 16 bits, rounded to a byte.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_REACH = {"bilinear": 1, "bicubic": 2}  # of the filter, in pixels of the image


class _Taps(NamedTuple):
    """The weighted sums that make n pixels along one side.

    Attributes:
        first: (n,) the first pixel of each sum.
        weights: (n, k) integers.
        precision: their binary places.
    """

    first: np.ndarray
    weights: np.ndarray
    precision: int


def enlarged_window(
    image: Tensor, size: tuple[int, int], start: tuple[int, int], shape: tuple[int, int], interpolation: str
) -> Tensor:
    """A window of an image that is resized to at least its own size.

    Args:
        image: (1, 3, H, W) uint8.
        size: height and width that the whole image would have.
        start: top and left of the window.
        shape: height and width of the window.
        interpolation: "bilinear" or "bicubic".

    Returns:
        (1, 3, h, w) uint8.
    """
    rows, columns = (
        _taps(image.shape[2 + side], size[side], start[side], shape[side], interpolation) for side in (0, 1)
    )
    top, bottom = int(rows.first.min()), int(rows.first.max()) + rows.weights.shape[1]
    part = _summed(image[:, :, top:bottom], 3, columns)  # the other rows are in no sum
    return _summed(part, 2, rows._replace(first=rows.first - top))


def _summed(image: Tensor, side: int, taps: _Taps) -> Tensor:
    """The sums along a side of the image."""
    import torch

    length = image.shape[side]
    total = torch.zeros((), dtype=torch.int32, device=image.device)
    for place in range(taps.weights.shape[1]):
        index = torch.from_numpy(np.minimum(taps.first + place, length - 1)).to(image.device)  # beyond: weight 0
        weights = torch.from_numpy(taps.weights[:, place]).to(image.device)
        pixels = image.index_select(side, index).to(torch.int32)
        total = total + pixels * (weights[:, None] if side == 2 else weights)
    half = 1 << (taps.precision - 1)
    return ((total + half) >> taps.precision).clamp_(0, 255).to(torch.uint8)


def _taps(old: int, new: int, start: int, count: int, interpolation: str) -> _Taps:
    if old == new:
        return _Taps(np.arange(start, start + count), np.full((count, 1), 1 << 14, dtype=np.int32), 14)
    first, weights = _weights(old, new, np.arange(start, start + count), interpolation)
    # One precision for all pixels of the side; the largest weights are at its ends, where sums lack pixels.
    at_ends = min(new, math.ceil((_REACH[interpolation] + 1) * new / old) + 1)
    ends = np.concatenate([np.arange(at_ends), np.arange(new - at_ends, new)])
    largest = max(weights.max(), _weights(old, new, ends, interpolation)[1].max())
    precision = next((p for p in range(22) if int(0.5 + largest * (1 << (p + 1))) >= 1 << 15), 22)
    scaled = weights * (1 << precision)
    return _Taps(first, np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int32), precision)


def _weights(old: int, new: int, pixels: np.ndarray, interpolation: str) -> tuple[np.ndarray, np.ndarray]:
    """First pixel (n,) and weights (n, k), which sum to 1, of some pixels of the enlarged side."""
    reach = _REACH[interpolation]
    center = old / new * (pixels + 0.5)
    first = np.maximum((center - reach + 0.5).astype(np.int64), 0)  # towards 0, as a cast in C
    end = np.minimum((center + reach + 0.5).astype(np.int64), old)
    places = first[:, None] + np.arange(2 * reach + 1)
    weights = np.where(places < end[:, None], _filter(np.abs(places - center[:, None] + 0.5), interpolation), 0.0)
    return first, weights / weights.sum(axis=1, keepdims=True)


def _filter(x: np.ndarray, interpolation: str) -> np.ndarray:
    if interpolation == "bilinear":
        return np.maximum(1 - x, 0)
    a = -0.5
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
