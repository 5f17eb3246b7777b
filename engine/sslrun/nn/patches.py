"""Images as patches, row by row, and back: what methods that predict hidden patches share."""

import torch
from torch import Tensor

from sslrun.errors import UsageError
from sslrun.nn.precision import wide


def patches_of(images: Tensor, side: int) -> Tensor:
    """(B, T, side^2 C): patches row by row, each with its pixels in the order row, column, channel.

    Args:
        images: (B, C, H, W).
        side: height and width of a patch in pixels.

    Raises:
        UsageError: the images do not consist of whole patches.
    """
    batch, channels, height, width = images.shape
    if height % side or width % side:
        raise UsageError(f"images of {height} x {width} px do not consist of patches of {side} px (patch_size)")
    parts = images.reshape(batch, channels, height // side, side, width // side, side)
    return parts.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * channels)


def images_of(patches: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patches_of`: (B, C, H, W).

    Args:
        patches: (B, T, side^2 C).
        side: height and width of a patch in pixels.
        grid: rows and columns of patches.
    """
    parts = patches.reshape(len(patches), *grid, side, side, -1)
    return parts.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, grid[0] * side, grid[1] * side)


def normalized(patches: Tensor) -> Tensor:
    """Patches (..., P), each minus its mean and divided by its standard deviation, with 1e-6 added to the unbiased
    variance."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / torch.sqrt(variance + 1e-6)


def unnormalized(patches: Tensor, like: Tensor) -> Tensor:
    """The inverse of `normalized`, with the mean and the standard deviation of other patches.

    Args:
        patches: (..., P).
        like: (..., P), patches that are not normalized.
    """
    variance, mean = torch.var_mean(like, dim=-1, keepdim=True)
    return patches * torch.sqrt(variance + 1e-6) + mean


def with_patches(images: Tensor, patches: Tensor, places: Tensor, side: int) -> Tensor:
    """The images (B, C, H, W) with other pixels in some of their patches.

    Args:
        images: (B, C, H, W).
        patches: (B, n, side^2 C), the pixels.
        places: (B, n) int64, the patches that they replace.
        side: height and width of a patch in pixels.
    """
    index = places.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
    replaced = patches_of(wide(images), side).scatter(1, index, wide(patches))
    return images_of(replaced, side, (images.shape[-2] // side, images.shape[-1] // side))
