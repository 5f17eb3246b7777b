import math

import numpy as np

from sslrun.data.masks.base import Mask, MaskDraws
from sslrun.errors import UsageError


class RandomMask(Mask):
    """Hides a fixed number of patches, any with equal probability.

    The mask of MAE (He et al. 2021, arXiv 2111.06377) and, in cells of 2 x 2 patches, of SimMIM (Xie et al. 2021, arXiv
    2111.09886).

    Args:
        ratio: share of the patches to hide, above 0 and below 1; their number is rounded up.
        patch_size: side of a patch in pixels, that of the backbone.
        cell_size: side in pixels of the squares that are hidden as a whole, a multiple of patch_size; by default a
            patch.
    """

    def __init__(self, ratio: float = 0.75, patch_size: int = 16, cell_size: int | None = None) -> None:
        super().__init__(patch_size)
        if not 0 < ratio < 1:
            raise UsageError(f"ratio must lie between 0 and 1, not {ratio}")
        self.ratio = ratio
        self.cell_size = patch_size if cell_size is None else cell_size
        if self.cell_size < patch_size or self.cell_size % patch_size:
            raise UsageError(f"cell_size is {cell_size}, which is no multiple of patch_size = {patch_size}")

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        grid = super().grid(size)
        if size[0] % self.cell_size or size[1] % self.cell_size:
            raise UsageError(f"{size[0]} x {size[1]} pixels do not consist of cells of {self.cell_size} pixels")
        return grid

    def draw(self, draws: MaskDraws, grid: tuple[int, int]) -> np.ndarray:
        patches = self.cell_size // self.patch_size  # along a side of a cell
        rows, columns = grid[0] // patches, grid[1] // patches
        hidden = at_random(draws.uniforms(0, rows * columns), np.array(count_of(rows * columns, self.ratio)))
        return hidden.reshape(-1, rows, columns).repeat(patches, axis=1).repeat(patches, axis=2)


def at_random(uniforms: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(N, T) bool with counts[n] True in row n: where its uniform numbers are least.

    Args:
        uniforms: (N, T).
        counts: (N,), or one number for all rows.
    """
    order = uniforms.argsort(axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(uniforms.shape[1])[None], axis=1)
    return ranks < counts.reshape(-1, 1)


def count_of(patches: int, ratio: float) -> int:
    """How many of the patches to hide: the ratio of them, rounded up (0.6 of 5 is 3, whatever 0.6 is in binary)."""
    return math.ceil(round(patches * ratio, 9))
