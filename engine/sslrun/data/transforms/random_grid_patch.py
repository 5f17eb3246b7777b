import numpy as np

from sslrun.data.transforms.cropping import Cropping
from sslrun.errors import UsageError


class RandomGridPatch(Cropping):
    """Divides the image into a grid with one cell for each view, row by row; a view is a random window of its cell.

    The patches of Relative-Loc (Doersch et al. 2015, arXiv 1505.05192): 64 pixels of cells of 85, 3 x 3 of them in
    255 pixels; gap and jitter keep edges from telling where a neighbor is. Pixels beyond the last whole cell of a row
    or column are not used.

    Args:
        size: height and width of the window in pixels; one number for a square.
        grid: rows and columns of cells; the group has grid x grid views.
    """

    num_draws = 4
    view_draw = 1

    def __init__(self, size: int | list[int], grid: int = 3) -> None:
        super().__init__(size)
        if grid < 1:
            raise UsageError(f"grid must be at least 1, not {grid}")
        self.grid = grid
        self.num_views = grid**2

    def starts(self, uniforms: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        view = np.floor(uniforms[:, 0] * self.grid**2).astype(np.int64)
        cell = sizes // self.grid
        jitter = np.floor(uniforms[:, 1:] * (np.maximum(cell - self.size, 0) + 1)).astype(np.int64)
        return np.stack([view // self.grid, view % self.grid], axis=1) * cell + jitter

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if size is not None and (size[0] // self.grid < self.size[0] or size[1] // self.grid < self.size[1]):
            raise UsageError(f"patches of {self.size} do not fit into {self.grid} x {self.grid} cells of {size} pixels")
        return self.size
