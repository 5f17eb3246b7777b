from collections.abc import Sequence

import numpy as np

from sslrun.data.masks.base import Mask, MaskDraws
from sslrun.data.masks.random_mask import at_random
from sslrun.errors import UsageError

_DRAWS = 3
"""Of each block and of the context: shape, top and left."""

_SINGLES = 1 << 20
"""Index of the first draw of the visible patches, after those of blocks."""


class MultiBlockMask(Mask):
    """Leaves some patches visible and chooses blocks of hidden ones, which may overlap, for a method to predict.

    The sampler of I-JEPA (Assran et al. 2023, arXiv 2301.08243, section 3 and appendix A). Visible are some patches of
    a large square that are in no block. Unlike there, the number of visible patches and that of the patches of a block
    are fixed, so that shapes are the same in all steps: the authors draw the area of a block anew for each batch,
    between 15 and 20 % of the image, and cut the lists of visible patches to the shortest of the batch. Where the
    number of patches of a block is no multiple of its width, its last row is shorter. Visible patches are drawn at
    random from those that are left of the square; if it has too few, some are taken from the rest of the image.

    Args:
        num_blocks: number of blocks of a view.
        block_ratio: share of the patches in a block; their number is rounded.
        aspect: least and greatest ratio of height and width of a block, drawn uniformly.
        context_ratio: share of the patches that are visible; their number is rounded.
        context_scale: least and greatest share of the image in the square of which patches are visible.
        patch_size: side of a patch in pixels, that of the backbone.
    """

    def __init__(
        self,
        num_blocks: int = 4,
        block_ratio: float = 0.175,
        aspect: Sequence[float] = (0.75, 1.5),
        context_ratio: float = 0.25,
        context_scale: Sequence[float] = (0.85, 1.0),
        patch_size: int = 16,
    ) -> None:
        super().__init__(patch_size)
        if num_blocks < 1:
            raise UsageError(f"num_blocks must be at least 1, not {num_blocks}")
        for name, value in (("block_ratio", block_ratio), ("context_ratio", context_ratio)):
            if not 0 < value < 1:
                raise UsageError(f"{name} must lie between 0 and 1, not {value}")
        if len(aspect) != 2 or not 0 < aspect[0] <= aspect[1]:
            raise UsageError(f"aspect must be two numbers above 0, the second not less, not {list(aspect)}")
        if len(context_scale) != 2 or not 0 < context_scale[0] <= context_scale[1] <= 1:
            raise UsageError(
                f"context_scale must be two numbers above 0, up to 1, the second not less, not {list(context_scale)}"
            )
        if num_blocks * block_ratio + context_ratio > 1:
            raise UsageError(
                f"num_blocks * block_ratio + context_ratio is {num_blocks * block_ratio + context_ratio:.3g}; above 1 "
                "there could be too few patches outside of all blocks"
            )
        self.num_blocks, self.block_ratio, self.context_ratio = num_blocks, block_ratio, context_ratio
        self.aspect, self.context_scale = tuple(aspect), tuple(context_scale)

    def draw(self, draws: MaskDraws, grid: tuple[int, int]) -> np.ndarray:
        rows, columns = grid
        blocks = self.blocks(draws, grid)
        is_target = np.zeros((len(blocks), rows * columns))
        np.put_along_axis(is_target, blocks.reshape(len(blocks), -1), 1, axis=1)
        scale, top, left = draws.uniforms(_DRAWS * self.num_blocks, _DRAWS).T[:, :, None]
        low, high = self.context_scale
        side = np.sqrt(low + scale * (high - low))
        in_rows, in_columns = (
            _within(np.maximum(1, np.rint(side * size)), place, size) for size, place in ((rows, top), (columns, left))
        )
        is_outside = ~(in_rows[:, :, None] & in_columns[:, None, :]).reshape(len(blocks), -1)
        keys = draws.uniforms(_SINGLES, rows * columns) + is_outside + 2 * is_target  # the least ones are visible
        return ~at_random(keys, np.array(self._counts(grid)[1])).reshape(len(blocks), rows, columns)

    def blocks(self, draws: MaskDraws, grid: tuple[int, int]) -> np.ndarray:
        rows, columns = grid
        count, _ = self._counts(grid)
        numbers = draws.uniforms(0, _DRAWS * self.num_blocks).reshape(-1, self.num_blocks, _DRAWS)
        low, high = self.aspect
        width = np.rint(np.sqrt(count / (low + numbers[..., 0] * (high - low)))).astype(np.int64)
        width = width.clip(-(-count // rows), columns)
        height = -(-count // width)
        top = np.floor(numbers[..., 1] * (rows - height + 1)).astype(np.int64)
        left = np.floor(numbers[..., 2] * (columns - width + 1)).astype(np.int64)
        row, column = np.divmod(np.arange(count), width[..., None])
        return (top[..., None] + row) * columns + left[..., None] + column

    def _counts(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Numbers of the patches of a block and of the visible patches.

        Raises:
            UsageError: there are too few patches.
        """
        patches = grid[0] * grid[1]
        block, context = max(1, round(self.block_ratio * patches)), max(1, round(self.context_ratio * patches))
        if self.num_blocks * block + context > patches:
            raise UsageError(
                f"{self.num_blocks} blocks of {block} patches and {context} visible ones do not fit into the "
                f"{grid[0]} x {grid[1]} patches of a view: lower block_ratio or context_ratio"
            )
        return block, context


def _within(length: np.ndarray, place: np.ndarray, size: int) -> np.ndarray:
    """(N, size) bool: the positions of an interval.

    Args:
        length: (N, 1), how long it is.
        place: (N, 1) in [0, 1), where it begins, as a share of the possible places.
        size: number of positions.
    """
    first = np.floor(place * (size - length + 1))
    positions = np.arange(size)
    return (positions >= first) & (positions < first + length)
