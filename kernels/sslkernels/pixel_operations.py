"""Operations on pixels with PIL's arithmetic, in plain PyTorch and in Triton: what `views.py` is made of.

Between two operations pixels are whole numbers from 0 to 255, what PIL would have stored as bytes (Pillow's Blend.c,
Convert.c and ImageEnhance; torchvision's functional transforms).

    BRIGHTNESS   min(factor x, 255)
    CONTRAST     factor (x - mean) + mean, with the image's own mean gray, rounded; cut to 0 to 255
    SATURATION   factor (x - gray) + gray; cut to 0 to 255
    HUE          turned by whole steps of 1/255 circle, in HSV of bytes
    GRAY         ITU-R 601-2 luma in 16-bit fixed point
    SOLARIZE     255 - x where x is at least the value
    BLUR         whole weights, rounded to 1/16 level between the passes; the border is reflected

All results are rounded down. PyTorch computes quotients in whole numbers. In Triton, whose division is approximate,
they are floor((dividend + half a unit) * reciprocal): half a unit keeps the true quotient so far from the next whole
number that any reciprocal good to 4e-6 will do. Where a product and a sum are rounded one by one, a fused multiply-add
would change the result, so kernels that use these functions must be launched with `enable_fp_fusion=False`.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

NOTHING = -1
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, SOLARIZE, BLUR = range(7)


def operation(x: Tensor, code: int, value: Tensor) -> Tensor:
    """One operation on an image: (3, h, w) int64 of bytes -> the same. `value` is 0-d float32; BLUR is `blur`."""
    if code == BRIGHTNESS:
        return (x.float() * value).clamp(max=255.0).long()
    if code == SOLARIZE:
        return torch.where(x >= value, 255 - x, x)
    if code == HUE:
        return _turned(x, int(value))
    red, green, blue = x
    gray = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    if code == GRAY:
        return gray.expand(3, -1, -1)
    if code == CONTRAST:
        gray = (2 * gray.sum() + gray.numel()) // (2 * gray.numel())
    return ((x - gray).float() * value + gray.float()).clamp(0.0, 255.0).long()


def _turned(x: Tensor, steps: int) -> Tensor:
    red, green, blue = x
    value = x.amax(0)
    chroma = value - x.amin(0)
    below = 255 * chroma // value.clamp(min=1) * value
    green_or_blue = torch.where(green == value, 2 * chroma + blue - red, 4 * chroma + red - green)
    turn = torch.where(red == value, green - blue, green_or_blue)
    byte = (85 * turn // (2 * chroma.clamp(min=1)) + 255 * (turn < 0) + steps) % 256
    distances = 510 - (6 * byte - 765).abs(), (6 * byte - 510).abs() - 255, (6 * byte - 1020).abs() - 255
    shares = torch.stack(distances).clamp(0, 255) * below
    return (2 * 65025 * value - 2 * shares + 65025) // (2 * 65025)


def blur(x: Tensor, taps: Tensor) -> Tensor:
    """An image (3, h, w) int64 of bytes, blurred; `taps` (2, T) int64, horizontal and vertical, center first."""
    reach = taps.shape[1] - 1
    for dim, weights, bits in ((2, taps[0], 12), (1, taps[1], 16)):
        sides = (reach, reach, 0, 0) if dim == 2 else (0, 0, reach, reach)
        padded = F.pad(x.double(), sides, mode="reflect").long()
        near = [padded.narrow(dim, reach + k, x.shape[dim]) * weights[abs(k)] for k in range(-reach, reach + 1)]
        x = (torch.stack(near).sum(0) + 2 ** (bits - 1)) >> bits
    return x


@triton.jit
def reciprocal(x):
    return 1.0 / x


@triton.jit
def floor_quotient(dividend, half_unit, divisor):
    """floor(dividend / divisor). `half_unit` is half of the smallest distance of two dividends."""
    return tl.floor((dividend + half_unit) * reciprocal(divisor))


@triton.jit
def rounded_mean(total, count):
    return (2 * total + count) // (2 * count)


@triton.jit
def luma(r, g, b):
    # Whole numbers below 2**24: exact, fused or not.
    total = tl.fma(r, 19595.0, tl.fma(g, 38470.0, tl.fma(b, 7471.0, 32768.0)))
    return tl.floor(total * 0.0000152587890625)  # 2**-16


@triton.jit
def brightened(x, factor):
    return tl.floor(tl.minimum(x * factor, 255.0))


@triton.jit
def solarized(x, threshold):
    return tl.where(x >= threshold, 255.0 - x, x)


@triton.jit
def blended(x, degenerate, factor):
    return tl.floor(tl.minimum(tl.maximum((x - degenerate) * factor + degenerate, 0.0), 255.0))


@triton.jit
def _turned_channel(value, below, distance):
    share = tl.minimum(tl.maximum(distance, 0.0), 255.0) * below * 1.5378700499807768e-05  # 1 / 65025
    return tl.floor(value - share + 0.5)


@triton.jit
def turned(r, g, b, steps):
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    below = floor_quotient(chroma * 255.0, 0.5, tl.maximum(value, 1.0)) * value
    turn = tl.where(r == value, g - b, tl.where(g == value, 2.0 * chroma + (b - r), 4.0 * chroma + (r - g)))
    byte = floor_quotient(turn * 42.5, 0.25, tl.maximum(chroma, 1.0))
    byte += tl.where(turn < 0.0, 255.0, 0.0) + steps
    byte -= tl.floor(byte * 0.00390625) * 256.0
    sector = byte * 6.0
    return (
        _turned_channel(value, below, 510.0 - tl.abs(sector - 765.0)),
        _turned_channel(value, below, tl.abs(sector - 510.0) - 255.0),
        _turned_channel(value, below, tl.abs(sector - 1020.0) - 255.0),
    )
