import math
from collections.abc import Sequence

import numpy as np

from sslrun.data.transforms.base import pair_of_pixels, within
from sslrun.data.transforms.resampling import Interpolation, Resampling


class RandomResizedCrop(Resampling):
    """Crops a box of random area and aspect ratio and resizes it.

    As in torchvision, ten boxes are tried, then the largest central box is taken.

    Args:
        size: height and width of the result in pixels; one number for a square.
        scale: smallest and largest area of the box, as a share of the image's area.
        ratio: smallest and largest aspect ratio of the box, width / height.
        interpolation: interpolation of the resize, "bilinear" or "bicubic"; both filter before shrinking, as in PIL.
        p: probability of cropping an image; other images keep their size.
    """

    tries = 10
    num_draws = 1 + 4 * tries

    def __init__(
        self,
        size: int | list[int],
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: Interpolation = "bilinear",
        p: float = 1.0,
    ) -> None:
        super().__init__(interpolation=interpolation, p=p)
        self.size = pair_of_pixels("size", size)
        self.scale = within("scale", scale, 0.0, math.inf)
        self.ratio = within("ratio", ratio, 1e-6, math.inf)

    def boxes(self, uniforms: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u = uniforms.reshape(len(sizes), self.tries, 4)
        height, width = sizes[:, :1], sizes[:, 1:]
        area = height * width * (self.scale[0] + u[..., 0] * (self.scale[1] - self.scale[0]))
        low, high = np.log(self.ratio[0]), np.log(self.ratio[1])
        aspect = np.exp(low + u[..., 1] * (high - low))
        w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        top = np.floor(u[..., 2] * (height - h + 1)).astype(np.int64)
        left = np.floor(u[..., 3] * (width - w + 1)).astype(np.int64)
        tries = np.stack([top, left, h, w], axis=-1)
        first = tries[np.arange(len(sizes)), fits.argmax(axis=1)]
        box = np.where(fits.any(axis=1)[:, None], first, self._central(sizes))
        return box, np.broadcast_to(self.size, (len(sizes), 2))

    def _central(self, sizes: np.ndarray) -> np.ndarray:
        height, width = sizes[:, 0], sizes[:, 1]
        wide, narrow = width / height > self.ratio[1], width / height < self.ratio[0]
        h = np.where(narrow, np.rint(width / self.ratio[0]), height).astype(np.int64)
        w = np.where(wide, np.rint(height * self.ratio[1]), width).astype(np.int64)
        return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)

    def size_when_applied(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        return self.size
