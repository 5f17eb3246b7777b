"""Transforms that only move pixels: crops, resizes, turns, flips."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from sslrun.data.transforms.base import Parameters, Transform, pair_of_pixels, within
from sslrun.errors import UsageError

Interpolation = Literal["bilinear", "bicubic"]


class Placing(Transform, listed=False):
    """What takes the pixels of each image from places of its own: it is done image by image, a flip is not."""

    geometric = True


class Resample(Placing, listed=False):
    """What crops and resizes share: a box of the image becomes an image of a new size."""

    def __init__(self, *, interpolation: Interpolation, p: float) -> None:
        super().__init__(p=p)
        if interpolation not in ("bilinear", "bicubic"):
            raise UsageError(f'interpolation must be "bilinear" or "bicubic", not {interpolation!r}')
        self.interpolation = interpolation

    def parameters(self, uniforms: np.ndarray, sizes: np.ndarray) -> Parameters:
        """Adds `box` (B, 4), top, left, height, width, and `size` (B, 2), the height and width it becomes."""
        apply = uniforms[:, 0] < self.p
        box, size = self.boxes(uniforms[:, 1:], sizes.astype(np.int64))
        whole = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
        return {
            "apply": apply,
            "box": np.where(apply[:, None], box, whole).astype(np.int32),
            "size": np.where(apply[:, None], size, sizes).astype(np.int32),
        }

    def describe(self, numbers: Parameters) -> dict[str, Any]:
        return _box(numbers["box"]) | {"to_px": numbers["size"].tolist()}

    def boxes(self, uniforms: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Box (B, 4) and new size (B, 2) of images to which the transform applies."""
        raise NotImplementedError

    def _size_when_applied(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        raise NotImplementedError

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        applied = self._size_when_applied(size)
        return applied if self.p == 1.0 or applied == size else size if self.p == 0.0 else None


class RandomResizedCrop(Resample):
    """A box of random area and aspect ratio, resized; torchvision's rule, ten tries and then the largest central box.

    Args:
        size: height and width of the result in pixels; one number for a square.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width / height.
        interpolation: "bilinear" or "bicubic"; both filter before they shrink, as PIL does.
        p: probability; an image that is not cropped keeps its size.
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

    def _size_when_applied(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        return self.size


class Resize(Resample):
    """The whole image in a new size.

    Args:
        size: one number is the shorter side in pixels (the other follows, rounded down); a list is height and width.
        interpolation: "bilinear" or "bicubic"; both filter before they shrink, as PIL does.
        p: probability; an image that is not resized keeps its size.
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

    def _size_when_applied(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if self.short_side is None:
            return self.size
        if size is None:
            return None
        height, width = self.boxes(np.empty((1, 0)), np.array([size]))[1][0]
        return int(height), int(width)


class Crop(Placing, listed=False):
    """What crops share: a window of the image, pixel for pixel; black where it reaches beyond the image.

    Args:
        size: height and width in pixels; one number for a square.
        p: probability; an image that is not cropped keeps its size.
    """

    def __init__(self, size: int | list[int], p: float = 1.0) -> None:
        super().__init__(p=p)
        self.size = pair_of_pixels("size", size)

    def parameters(self, uniforms: np.ndarray, sizes: np.ndarray) -> Parameters:
        """Adds `start` (B, 2), top and left, negative where black is added, and `size` (B, 2)."""
        apply = uniforms[:, :1] < self.p
        return {
            "apply": apply[:, 0],
            "start": np.where(apply, self.starts(uniforms[:, 1:], sizes.astype(np.int64)), 0).astype(np.int32),
            "size": np.where(apply, self.size, sizes).astype(np.int32),
        }

    def describe(self, numbers: Parameters) -> dict[str, Any]:
        return _box([*numbers["start"], *numbers["size"]])

    def starts(self, uniforms: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Top and left (B, 2) of the windows of images to which the transform applies."""
        raise NotImplementedError

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        return self.size if self.p == 1.0 or size == self.size else size if self.p == 0.0 else None


class CenterCrop(Crop):
    """The middle of the image; where the image is smaller, black is added around it, as torchvision does.

    Args:
        size: height and width in pixels; one number for a square.
        p: probability; an image that is not cropped keeps its size.
    """

    def starts(self, uniforms: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        # torchvision pads half the lack, rounded down, on the top and left; what is cut is halved to the even number.
        lack = np.maximum(np.array(self.size) - sizes, 0)
        return np.where(lack > 0, -(lack // 2), np.rint((sizes - self.size) / 2.0).astype(np.int64))


class RandomCrop(Crop):
    """A window anywhere in the image; where the image is smaller, black is added around it.

    Args:
        size: height and width in pixels; one number for a square.
        p: probability; an image that is not cropped keeps its size.
    """

    num_draws = 3

    def starts(self, uniforms: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        slack = sizes - self.size
        return np.where(slack < 0, -(-slack // 2), np.floor(uniforms * (slack + 1)).astype(np.int64))


class RandomGridPatch(Crop):
    """A grid over the image, one cell for each view of its group, row by row; of the cell a window anywhere in it.

    The patches of Relative-Loc (Doersch et al. 2015, arXiv 1505.05192): 64 pixels of cells of 85, 3 x 3 of them in
    255 pixels; gap and jitter keep edges from telling where a neighbor is. What is left over beyond the last cell of a
    row or column is not seen.

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

    def starts(self, uniforms: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        view = np.floor(uniforms[:, 0] * self.grid**2).astype(np.int64)
        cell = sizes // self.grid
        jitter = np.floor(uniforms[:, 1:] * (np.maximum(cell - self.size, 0) + 1)).astype(np.int64)
        return np.stack([view // self.grid, view % self.grid], axis=1) * cell + jitter

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if size is not None and (size[0] // self.grid < self.size[0] or size[1] // self.grid < self.size[1]):
            raise UsageError(f"patches of {self.size} do not fit into {self.grid} x {self.grid} cells of {size} pixels")
        return self.size


class RandomRotation(Placing):
    """The image turned about its middle by a random angle, pixel for nearest pixel; corners that come in are black.

    Args:
        degrees: the largest turn to either side, or the smallest and largest counter-clockwise turn.
        p: probability.
    """

    num_draws = 2

    def __init__(self, degrees: float | list[float], p: float = 1.0) -> None:
        super().__init__(p=p)
        if not isinstance(degrees, Sequence) and degrees < 0:
            raise UsageError(f"degrees must be 0 or more, or [smallest, largest], not {degrees}")
        both_ends = degrees if isinstance(degrees, Sequence) else [-degrees, degrees]
        self.degrees = within("degrees", both_ends, -360.0, 360.0)

    def parameters(self, uniforms: np.ndarray, sizes: np.ndarray) -> Parameters:
        """Adds `affine` (B, 6), a to f: the pixel at column x and row y comes from column a x + b y + c and row
        d x + e y + f, where the middle of the first pixel is at 0.5, 0.5."""
        apply = uniforms[:, 0] < self.p
        turns = np.radians(self.degrees[0] + uniforms[:, 1] * (self.degrees[1] - self.degrees[0]))
        cosine, sine = (np.round(f(np.where(apply, turns, 0.0)), 15) for f in (np.cos, np.sin))  # as in PIL
        y, x = sizes.T / 2.0
        columns = cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y
        return {"apply": apply, "affine": np.stack(columns, axis=1)}

    def describe(self, numbers: Parameters) -> dict[str, Any]:
        a, b, *_ = numbers["affine"].tolist()
        return {"counter_clockwise_degrees": math.degrees(math.atan2(-b, a))}


class RandomHorizontalFlip(Transform):
    """Left and right exchanged.

    Args:
        p: probability.
    """

    geometric = True

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p=p)


def _box(numbers: Iterable[int]) -> dict[str, int]:
    return {f"{name}_px": int(n) for name, n in zip(("top", "left", "height", "width"), numbers, strict=True)}
