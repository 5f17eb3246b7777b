"""Histograms of oriented gradients (Dalal and Triggs 2005, CVPR), the target of MaskFeat."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def oriented_gradients(images: Tensor, cell: int = 8, bins: int = 9, window: int = 16) -> Tensor:
    """Histograms of the gradients' directions in each cell and channel, (B, C, bins, H / cell, W / cell).

    As in MaskFeat (Wei et al. 2021, arXiv 2112.09133) and its authors' code: gradients by Sobel's filter, the image
    mirrored at its edges; directions are those of lines, so that opposite gradients count alike, and each pixel counts
    in one bin, by the length of its gradient and its place in a window of the image (a Gaussian whose standard
    deviation is half the window). The histogram of each cell and channel then has length 1. It does not depend on an
    offset or a positive factor of a channel, so normalized images have those of their pixels.

    Args:
        images: (B, C, H, W) float32 or float64.
        cell: height and width of a cell in pixels; divides H and W.
        bins: number of directions, over half a turn.
        window: height and width in pixels of the Gaussian that is repeated over the image; divides H and W.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    left = padded[..., :-2] - padded[..., 2:]
    up = padded[..., :-2, :] - padded[..., 2:, :]
    across = left[..., :-2, :] + 2 * left[..., 1:-1, :] + left[..., 2:, :]
    down = up[..., :-2] + 2 * up[..., 1:-1] + up[..., 2:]
    bell = gaussian(window, images.device).to(images.dtype).repeat(height // window, width // window)
    weight = (across.square() + down.square()).sqrt() * bell
    bin_of = (torch.atan2(across, down) / math.pi * bins).floor().remainder(bins)
    # One sum for each bin: a scatter would add in another order at each run on a GPU.
    sums = [F.avg_pool2d(weight * (bin_of == number), cell) for number in range(bins)]
    return F.normalize(torch.stack(sums, dim=2) * cell**2, dim=2)


def gaussian(side: int, device: torch.device | None = None) -> Tensor:
    """(side, side) float64: a Gaussian around the middle with a standard deviation of side // 2, whose sum is 1."""
    places = (torch.arange(side, dtype=torch.float64, device=device) - (side - 1) / 2) / (side // 2)
    line = torch.exp(-0.5 * places.square())
    square = torch.outer(line, line)
    return square / square.sum()
