"""What the exact stage computes, in plain torch: PIL's arithmetic to the rounding.

Pixels are planar float tensors, (N, 3, H, W), that hold whole numbers from 0 to 255: what PIL would have stored as
bytes. Every sum is one of whole numbers that float32 (for the mean, float64) holds exactly, so no result depends on
threads, on the batch, on the order of summation or on fused multiply-adds. Operations work in place. Factors come one
for each of the N images, as (N, 1, 1, 1). `pixels.c` holds the same expressions for the CPU and gives the same bits.

Sources: Pillow's Blend.c, Convert.c (gray and HSV) and ImageEnhance; torchvision's functional transforms.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from sslrun.data.transforms.color import BLUR_REACH


def gray(x: torch.Tensor) -> torch.Tensor:
    """(N, H, W) luma: PIL's 16-bit fixed point, whose largest sum, 255 * 65536 + 32768, float32 still holds exactly."""
    red, green, blue = x.unbind(1)
    total = torch.mul(red, 19595.0).add_(green, alpha=38470.0).add_(blue, alpha=7471.0)
    return total.add_(32768.0).mul_(2.0**-16).floor_()


def brightness(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Blend with black."""
    x.mul_(factor).clamp_(max=255.0).floor_()


def contrast(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Blend with the image's own mean gray, rounded to a whole level."""
    _, _, height, width = x.shape
    mean = gray(x).sum((1, 2), dtype=torch.float64).div_(height * width).add_(0.5).floor_()
    _blend(x, mean.to(torch.float32).view(-1, 1, 1, 1), factor)


def saturation(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Blend with the image's gray."""
    _blend(x, gray(x)[:, None], factor)


def _blend(x: torch.Tensor, degenerate: torch.Tensor, factor: torch.Tensor) -> None:
    x.sub_(degenerate).mul_(factor).add_(degenerate).clamp_(0.0, 255.0).floor_()


def hue(x: torch.Tensor, steps: torch.Tensor) -> None:
    """Turn the hue by whole steps of 1/255 circle, by way of PIL's HSV in bytes.

    In PIL, hue = floor(255 h) with h in [0, 1), saturation = floor(255 (max - min) / max), value = max. Here h is the
    quotient of two whole numbers; PIL's float rounding differs from it on 0.3 % of all colors, by one step.
    """
    red, green, blue = x.unbind(1)
    value = torch.maximum(red, green)
    low = torch.minimum(red, green)
    torch.maximum(value, blue, out=value)
    torch.minimum(low, blue, out=low)
    chroma = torch.sub(value, low, out=low)
    below_red, below_green, below_blue = value - red, value - green, value - blue
    saturation_times_value = (chroma * 255.0).div_(value.clamp(min=1.0)).floor_().mul_(value)
    # 6 h chroma: blue - green below where red is the largest, 2 chroma + red - blue where green is, else 4 chroma + ...
    # Written without comparisons, since a mask costs more than the arithmetic: clamped to 1, "below" is a mask already.
    total = (below_red + below_green).add_(below_blue).add_(chroma, alpha=2.0)
    turn = torch.sub(total, below_red, alpha=3.0).mul_(below_green.clamp(max=1.0)).add_(total)
    turn.sub_(below_blue, alpha=3.0).mul_(below_red.clamp_(max=1.0)).add_(below_blue).sub_(below_green)
    negative = turn.clamp(-1.0, 0.0)
    byte = turn.mul_(42.5).div_(chroma.clamp_(min=1.0)).floor_().sub_(negative, alpha=255.0).add_(steps[:, 0])
    byte.sub_(torch.mul(byte, 1 / 256, out=negative).floor_(), alpha=256.0)
    # Back, in units of 1/255 sector: each channel is below the value by saturation * value * clamp(distance).
    sector = byte.mul_(6.0)
    for channel, center in ((red, 765.0), (green, 510.0), (blue, 1020.0)):
        distance = torch.sub(sector, center, out=below_blue).abs_()
        distance = distance.neg_().add_(510.0) if channel is red else distance.sub_(255.0)
        share = distance.clamp_(0.0, 255.0).mul_(saturation_times_value).mul_(1 / 65025)
        torch.sub(value, share, out=channel).add_(0.5).floor_()


def grayscale(x: torch.Tensor) -> None:
    """Every channel the gray."""
    x.copy_(gray(x)[:, None])


def solarize(x: torch.Tensor, threshold: int) -> None:
    """255 - x where x is at the threshold or above."""
    inverted = (x - (threshold - 1.0)).clamp_(0.0, 1.0)
    x.add_(inverted.mul_(torch.mul(x, -2.0).add_(255.0)))


def blur_taps(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian weights in whole numbers, center first, one side only.

    Args:
        sigma: (N,) pixels.

    Returns:
        (N, taps) for the horizontal pass, which sum to 2**16 with both sides, and for the vertical pass, to 2**12: with
        pixels of 8 bits, and of 12 after the first pass, every sum stays below 2**24. An image's weights do not depend
        on its neighbors; beyond its own reach they are zero.
    """
    widths = sigma.astype(np.float64)[:, None]
    reach = np.ceil(BLUR_REACH * widths)
    distance = np.arange(int(reach.max()) + 1)
    weights = np.exp(-0.5 * (distance / widths) ** 2) * (distance <= reach)
    weights /= 2.0 * weights.sum(axis=1, keepdims=True) - weights[:, :1]

    def whole(total: int) -> np.ndarray:
        taps = np.rint(weights * total)
        taps[:, 0] = total - 2.0 * taps[:, 1:].sum(axis=1)
        return taps.astype(np.float32)

    return whole(2**16), whole(2**12)


def blur(x: torch.Tensor, horizontal: torch.Tensor, vertical: torch.Tensor) -> None:
    """Separable blur with reflected borders, rounded to 1/16 level between the passes and to a level at the end.

    Args:
        x: (N, 3, H, W).
        horizontal: (N, taps, 1, 1, 1) of `blur_taps`; no more taps than the image has rows or columns.
        vertical: the same.
    """
    _, _, height, width = x.shape
    reach = horizontal.shape[1] - 1
    padded = F.pad(x, (reach, reach, reach, reach), mode="reflect")
    rows = _filter(padded, horizontal, dim=3, length=width).mul_(2.0**-12).add_(0.5).floor_()
    torch.mul(_filter(rows, vertical, dim=2, length=height), 2.0**-16, out=x).add_(0.5).floor_()


def _filter(padded: torch.Tensor, taps: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    center, *sides = taps.unbind(1)
    reach = len(sides)
    total = padded.narrow(dim, reach, length) * center
    pair = torch.empty_like(total)
    for distance, weight in enumerate(sides, start=1):
        torch.add(padded.narrow(dim, reach - distance, length), padded.narrow(dim, reach + distance, length), out=pair)
        total.addcmul_(pair, weight)
    return total


def resample(image: torch.Tensor, box: Sequence[int], size: Sequence[int], interpolation: str) -> torch.Tensor:
    """A box of one image in a new size, filtered as PIL does (the filter sees only the box).

    Args:
        image: (1, 3, H, W) uint8, of any strides.
        box: top, left, height, width.
        size: height and width.
        interpolation: "bilinear" or "bicubic".
    """
    top, left, height, width = box
    crop = image[..., top : top + height, left : left + width]
    crop = crop.contiguous(memory_format=torch.channels_last)  # a third of the time goes with the gaps between rows
    rows, columns = size
    # Pillow's rule from 13 on: the height goes first where it shrinks, and by more than twice the width does.
    if height - rows > max(0, 2 * (width - columns)):
        crop = _interpolate(crop, rows, width, interpolation)
    return _interpolate(crop, rows, columns, interpolation)


def _interpolate(image: torch.Tensor, rows: int, columns: int, interpolation: str) -> torch.Tensor:
    if image.shape[2:] == (rows, columns):
        return image
    return F.interpolate(image, (rows, columns), mode=interpolation, align_corners=False, antialias=True)


def center_crop(image: torch.Tensor, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """Rows and columns from `start` on; black where they lie outside of the image."""
    (top, left), (height, width) = start, size
    _, _, old_height, old_width = image.shape
    if top >= 0 and left >= 0 and top + height <= old_height and left + width <= old_width:
        return image[..., top : top + height, left : left + width]
    return F.pad(image, (-left, left + width - old_width, -top, top + height - old_height))


def rotate(image: torch.Tensor, affine: Sequence[float]) -> torch.Tensor:
    """One image with each pixel taken from elsewhere in it, the nearest one; black where that lies outside.

    Places are counted in 65536ths of a pixel, as in Pillow's Geometry.c.

    Args:
        image: (1, 3, H, W) uint8, of any strides.
        affine: of `RandomRotation`.
    """
    a, b, c, d, e, f = affine
    _, _, height, width = image.shape
    x, y = torch.arange(width), torch.arange(height).unsqueeze(1)

    def place(slope_x: float, slope_y: float, start: float) -> torch.Tensor:
        first, by_x, by_y = (
            math.floor(65536.0 * v + 0.5) for v in (start + slope_x * 0.5 + slope_y * 0.5, slope_x, slope_y)
        )
        return ((first + by_y * y) + by_x * x) >> 16

    column, row = place(a, b, c), place(d, e, f)
    outside = (column < 0) | (column >= width) | (row < 0) | (row >= height)
    source = (row * width + column).masked_fill_(outside, height * width).flatten()
    pixels = torch.cat([image.permute(0, 2, 3, 1).reshape(-1, 3), image.new_zeros(1, 3)])
    return pixels.index_select(0, source).view(1, height, width, 3).permute(0, 3, 1, 2)
