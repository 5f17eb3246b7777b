import numpy as np

from sslrun.data.transforms.base import pair_of_pixels
from sslrun.data.transforms.resampling import Interpolation, Resampling


class Resize(Resampling):
    """Resizes the whole image.

    Args:
        size: the shorter side in pixels (the longer one keeps the aspect ratio, rounded down), or height and width.
        interpolation: interpolation of the resize, "bilinear" or "bicubic"; both filter before shrinking, as in PIL.
        p: probability of resizing an image; other images keep their size.
    """

    def __init__(self, size: int | list[int], interpolation: Interpolation = "bilinear", p: float = 1.0) -> None:
        super().__init__(interpolation=interpolation, p=p)
        self.short_side = size if isinstance(size, int) else None
        self.size = pair_of_pixels("size", size)

    def boxes(self, uniforms: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        box = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
        if self.short_side is None:
            return box, np.broadcast_to(self.size, sizes.shape)
        short = sizes.min(axis=1, keepdims=True)
        # In this order and in floating point: torchvision's int(size * long / short).
        return box, np.where(sizes == short, self.short_side, (self.short_side * sizes / short).astype(np.int64))

    def size_when_applied(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if self.short_side is None:
            return self.size
        if size is None:
            return None
        height, width = self.boxes(np.empty((1, 0)), np.array([size]))[1][0]
        return int(height), int(width)
