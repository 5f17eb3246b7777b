import numpy as np

from sslrun.data.masks.base import Mask, MaskDraws
from sslrun.data.masks.random_mask import at_random
from sslrun.errors import UsageError

TRIES = 10
"""Rectangles that are tried in a row before single patches are taken."""

_DRAWS = 4
"""Of each try: area, aspect ratio, top and left."""


class BlockMask(Mask):
    """Hides rectangles of patches until a given number is reached; the last few are single patches at random.

    The sampler of BEiT (Bao et al. 2021, arXiv 2106.08254, algorithm 1), which iBOT, DINOv2 and MaskFeat took over. As
    in DINOv3 (Siméoni et al. 2025, arXiv 2508.10104) the number of hidden patches is fixed; the others may hide fewer,
    so that shapes differ from step to step. If `ratio` is a range, the views share it out evenly: of n views that have
    a mask, one has each of n ratios.

    Args:
        ratio: share of the patches to hide, or the range of the share, [least, greatest].
        probability: share of the views that have a mask, 0 to 1.
        min_patches: least area of a rectangle, in patches.
        max_ratio: greatest share of the patches that rectangles hide, 0 to 1; single patches may add to it.
        min_aspect: least ratio of height and width of a rectangle; the greatest is its reciprocal.
        samples: number of consecutive samples of an epoch whose views share out masks and ratios. The number of hidden
            patches of each such group of samples is constant; "${data.samples_per_gpu}" makes it one of each
            micro-batch.
        patch_size: side of a patch in pixels, that of the backbone.
    """

    def __init__(
        self,
        ratio: float | list[float] = 0.4,
        probability: float = 1.0,
        min_patches: int = 4,
        max_ratio: float = 1.0,
        min_aspect: float = 0.3,
        samples: int = 32,
        patch_size: int = 16,
    ) -> None:
        super().__init__(patch_size)
        low, high = ratio if isinstance(ratio, list) and len(ratio) == 2 else (ratio, ratio)
        if isinstance(low, list) or isinstance(high, list) or not 0 <= low <= high < 1:
            raise UsageError(f"ratio must be a number or two, at least 0, below 1, the second not less, not {ratio}")
        for name, value in (("probability", probability), ("max_ratio", max_ratio)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} must lie between 0 and 1, not {value}")
        if not 0 < min_aspect <= 1:
            raise UsageError(f"min_aspect must lie above 0 and not above 1, not {min_aspect}")
        for name, value in (("min_patches", min_patches), ("samples", samples)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        self.low, self.high, self.probability = low, high, probability
        self.min_patches, self.max_ratio, self.min_aspect, self.samples = min_patches, max_ratio, min_aspect, samples

    def draw(self, draws: MaskDraws, grid: tuple[int, int]) -> np.ndarray:
        counts = self.counts(draws, grid)
        greatest = np.minimum(counts, int(self.max_ratio * grid[0] * grid[1]))
        return fill(draws, grid, counts, greatest, self.min_patches, self.min_aspect)

    def counts(self, draws: MaskDraws, grid: tuple[int, int]) -> np.ndarray:
        """(N,) number of hidden patches of each view."""
        slots = draws.slots(self.samples)
        masked = round(self.samples * len(draws.views) * self.probability)
        ratios = np.zeros(self.samples * len(draws.views))
        ratios[:masked] = np.linspace(self.low, self.high, masked + 1)[1:]  # the upper edges of equal intervals
        return np.floor(ratios[slots] * grid[0] * grid[1] + 1e-9).astype(np.int64)


def fill(
    draws: MaskDraws,
    grid: tuple[int, int],
    counts: np.ndarray,
    greatest: np.ndarray,
    min_patches: int,
    min_aspect: float,
) -> np.ndarray:
    """Hides exactly counts[n] patches of view n: rectangles, then single patches.

    A try draws a rectangle: area uniform between `min_patches` and what is left to hide, ratio of height and width
    log-uniform. It counts if the rectangle leaves a row and a column free and adds at least one patch, and no more than
    are left. After ten tries in a row that do not count, the rest is single patches.

    Args:
        draws: random numbers of N views.
        grid: rows and columns of patches.
        counts: (N,) numbers of patches.
        greatest: (N,) numbers of patches that rectangles hide at most, not above `counts`.
        min_patches: least area of a rectangle.
        min_aspect: least ratio of height and width of a rectangle.

    Returns:
        (N, rows, columns) bool.
    """
    height, width = grid
    hidden = np.zeros((len(counts), height, width), dtype=bool)
    failures = np.zeros(len(counts), dtype=np.int64)
    rows, columns = np.arange(height), np.arange(width)
    log_aspect = np.log(min_aspect)
    first = 0
    chunk = np.empty((len(counts), 0))
    while True:
        left = greatest - hidden.sum(axis=(1, 2))
        active = np.flatnonzero((left > 0) & (failures < TRIES))
        if len(active) == 0:
            break
        if chunk.shape[1] == 0:
            chunk = draws.uniforms(first, _DRAWS * TRIES)
            first += _DRAWS * TRIES
        u, chunk = chunk[active, :_DRAWS], chunk[:, _DRAWS:]
        left = left[active]
        area = min_patches + u[:, 0] * (left - min_patches)  # where fewer are left, less than min_patches
        aspect = np.exp(log_aspect * (1 - 2 * u[:, 1]))
        h = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        w = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (h < height) & (w < width)
        top = np.floor(u[:, 2] * (height - h + 1))
        side = np.floor(u[:, 3] * (width - w + 1))
        in_rows = (rows >= top[:, None]) & (rows < (top + h)[:, None])
        in_columns = (columns >= side[:, None]) & (columns < (side + w)[:, None])
        added = in_rows[:, :, None] & in_columns[:, None, :] & ~hidden[active]
        new = added.sum(axis=(1, 2))
        is_taken = fits & (new > 0) & (new <= left)
        hidden[active[is_taken]] |= added[is_taken]
        failures[active] = np.where(is_taken, 0, failures[active] + 1)
    flat = hidden.reshape(len(counts), -1)
    keys = draws.uniforms(_SINGLES, height * width) + flat  # hidden ones come last
    return (flat | at_random(keys, counts - flat.sum(axis=1))).reshape(hidden.shape)


_SINGLES = 1 << 20
"""Index of the first draw of single patches, after those of all tries."""
