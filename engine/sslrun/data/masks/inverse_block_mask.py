import numpy as np

from sslrun.data.masks.base import Mask, MaskDraws
from sslrun.data.masks.block_mask import fill
from sslrun.data.masks.random_mask import count_of
from sslrun.errors import UsageError


class InverseBlockMask(Mask):
    """Hides everything but rectangles of patches: what is visible hangs together.

    Of data2vec 2.0 (Baevski et al. 2022, arXiv 2212.07525) and CAPI (Darcet et al. 2025, arXiv 2502.08769), which also
    rolls the mask around the edges, so that patches at the edge are visible as often as others.

    Args:
        ratio: share of the patches to hide, above 0 and below 1; their number is rounded up.
        roll: whether the mask is shifted around the edges by a random number of rows and columns.
        min_patches: least area of a visible rectangle, in patches.
        min_aspect: least ratio of height and width of a rectangle; the greatest is its reciprocal.
        patch_size: side of a patch in pixels, that of the backbone.
    """

    def __init__(
        self,
        ratio: float = 0.65,
        roll: bool = True,
        min_patches: int = 4,
        min_aspect: float = 0.3,
        patch_size: int = 16,
    ) -> None:
        super().__init__(patch_size)
        if not 0 < ratio < 1:
            raise UsageError(f"ratio must lie between 0 and 1, not {ratio}")
        if min_patches < 1:
            raise UsageError(f"min_patches must be at least 1, not {min_patches}")
        if not 0 < min_aspect <= 1:
            raise UsageError(f"min_aspect must lie above 0 and not above 1, not {min_aspect}")
        self.ratio, self.roll, self.min_patches, self.min_aspect = ratio, roll, min_patches, min_aspect

    def draw(self, draws: MaskDraws, grid: tuple[int, int]) -> np.ndarray:
        height, width = grid
        count = len(draws.positions) * len(draws.views)
        visible = np.full(count, height * width - count_of(height * width, self.ratio))
        shown = fill(draws, grid, visible, visible, self.min_patches, self.min_aspect)
        if self.roll:
            shift = np.floor(draws.uniforms(_ROLL, 2) * (height, width)).astype(np.int64)
            rows = (np.arange(height) - shift[:, :1]) % height
            columns = (np.arange(width) - shift[:, 1:]) % width
            shown = shown[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
        return ~shown


_ROLL = 1 << 21
"""Index of the draws of the shift, after those that `fill` uses."""
