"""The transforms of a recipe: their arguments, how many draws each needs, and how draws become numbers.

A transform is written here as numbers, elsewhere as pixels: `exact.py` follows PIL's arithmetic, `graph.py` builds DALI
operators, and the tests hold both against PIL. All consume `parameters()`, the one place where uniform draws become
boxes, factors and yes or no, so that they can be compared picture by picture.

Legend: B pictures (or views of pictures), sizes are (B, 2) height and width of what enters. Numbers and numpy only.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from sslrun.config.component import Component
from sslrun.errors import UsageError

Parameters = dict[str, np.ndarray]
Interpolation = Literal["bilinear", "bicubic"]

# Numbers of the jitter's operations, in the columns of `factors` and as the entries of `order`.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

# A Gaussian is cut here, in standard deviations: beyond, a tap is less than half a unit of the fixed point in use.
BLUR_REACH = 4.0

# A uniform draw is below 1, so "draw < p" is always true at p = 1; this one never is, whatever p.
_NEVER = 1.0


class Transform(Component, kind="transforms"):
    """One step of a view.

    Args:
        p: probability that a picture is changed at all, 0 to 1.
    """

    num_draws: int = 1
    """Uniform draws that each picture consumes, the first of which decides whether the transform applies."""

    view_draw: int | None = None
    """Which of its draws is none but says what view of its group it is: view v of V has (v + 0.5) / V there."""

    geometric: bool = False
    """Whether it only moves pixels (and so may be done before the colours, by other hands)."""

    def __init__(self, *, p: float = 1.0) -> None:
        if not 0.0 <= p <= 1.0:
            raise UsageError(f"p must lie between 0 and 1, not {p}")
        self.p = float(p)

    def parameters(self, uniforms: np.ndarray, sizes: np.ndarray) -> Parameters:
        """What to do to each picture, as a pure function of its draws.

        Args:
            uniforms: (B, num_draws) in [0, 1).
            sizes: (B, 2) height and width of the pictures as they enter this transform.

        Returns:
            `apply`, (B,) bool, and the transform's own numbers, (B,) or (B, k). Where a picture is left alone, its box,
            size, order and factors are such that using them changes nothing.
        """
        return {"apply": uniforms[:, 0] < self.p}

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        """Height and width that every picture has afterwards; None where it differs from picture to picture.

        Args:
            size: what every picture has before, or None.
        """
        return size


class Resample(Transform, listed=False):
    """What crops and resizes share: a box of the picture becomes a picture of a new size."""

    geometric = True

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

    def boxes(self, uniforms: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Box (B, 4) and new size (B, 2) of pictures to which the transform applies."""
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
        scale: smallest and largest share of the picture's area.
        ratio: smallest and largest width / height.
        interpolation: "bilinear" or "bicubic"; both filter before they shrink, as PIL does.
        p: probability; a picture that is not cropped keeps its size.
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
        self.size = _pair_of_pixels("size", size)
        self.scale = _range("scale", scale, 0.0, math.inf)
        self.ratio = _range("ratio", ratio, 1e-6, math.inf)

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
    """The whole picture in a new size.

    Args:
        size: one number is the shorter side in pixels (the other follows, rounded down); a list is height and width.
        interpolation: "bilinear" or "bicubic"; both filter before they shrink, as PIL does.
        p: probability; a picture that is not resized keeps its size.
    """

    def __init__(self, size: int | list[int], interpolation: Interpolation = "bilinear", p: float = 1.0) -> None:
        super().__init__(interpolation=interpolation, p=p)
        self.short_side = size if isinstance(size, int) else None
        self.size = _pair_of_pixels("size", size)

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


class Crop(Transform, listed=False):
    """What crops share: a window of the picture, pixel for pixel; black where it reaches beyond the picture.

    Args:
        size: height and width in pixels; one number for a square.
        p: probability; a picture that is not cropped keeps its size.
    """

    geometric = True

    def __init__(self, size: int | list[int], p: float = 1.0) -> None:
        super().__init__(p=p)
        self.size = _pair_of_pixels("size", size)

    def parameters(self, uniforms: np.ndarray, sizes: np.ndarray) -> Parameters:
        """Adds `start` (B, 2), top and left, negative where black is added, and `size` (B, 2)."""
        apply = uniforms[:, :1] < self.p
        return {
            "apply": apply[:, 0],
            "start": np.where(apply, self.starts(uniforms[:, 1:], sizes.astype(np.int64)), 0).astype(np.int32),
            "size": np.where(apply, self.size, sizes).astype(np.int32),
        }

    def starts(self, uniforms: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Top and left (B, 2) of the windows of pictures to which the transform applies."""
        raise NotImplementedError

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        return self.size if self.p == 1.0 or size == self.size else size if self.p == 0.0 else None


class CenterCrop(Crop):
    """The middle of the picture; where the picture is smaller, black is added around it, as torchvision does.

    Args:
        size: height and width in pixels; one number for a square.
        p: probability; a picture that is not cropped keeps its size.
    """

    def starts(self, uniforms: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        # torchvision pads half the lack, rounded down, on the top and left; what is cut is halved to the even number.
        lack = np.maximum(np.array(self.size) - sizes, 0)
        return np.where(lack > 0, -(lack // 2), np.rint((sizes - self.size) / 2.0).astype(np.int64))


class RandomCrop(Crop):
    """A window anywhere in the picture; where the picture is smaller, black is added around it.

    Args:
        size: height and width in pixels; one number for a square.
        p: probability; a picture that is not cropped keeps its size.
    """

    num_draws = 3

    def starts(self, uniforms: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        slack = sizes - self.size
        return np.where(slack < 0, -(-slack // 2), np.floor(uniforms * (slack + 1)).astype(np.int64))


class RandomGridPatch(Crop):
    """A grid over the picture, one cell for each view of its group, row by row; of the cell a window anywhere in it.

    The patches of Relative-Loc (Doersch et al. 2015, arXiv 1505.05192): 64 pixels of cells of 85, 3 x 3 of them in
    255 pixels; gap and jitter keep edges from telling where a neighbour is. What is left over beyond the last cell of a
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


class RandomHorizontalFlip(Transform):
    """Left and right exchanged.

    Args:
        p: probability.
    """

    geometric = True

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p=p)


class ColorJitter(Transform):
    """Brightness, contrast, saturation and hue changed by random factors, in an order drawn for each picture.

    A number x stands for the factors from max(0, 1 - x) to 1 + x (hue: turns from -x to x of the circle), as in
    torchvision; a list gives both ends. What is 0 is not done at all.

    Args:
        brightness: strength, 0 or more.
        contrast: strength, 0 or more.
        saturation: strength, 0 or more.
        hue: strength, 0 to 0.5.
        p: probability.
    """

    num_draws = 1 + 4 + 4

    def __init__(
        self,
        brightness: float | list[float] = 0.0,
        contrast: float | list[float] = 0.0,
        saturation: float | list[float] = 0.0,
        hue: float | list[float] = 0.0,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.ranges = np.array(
            [
                _jitter_range("brightness", brightness, 1.0, math.inf),
                _jitter_range("contrast", contrast, 1.0, math.inf),
                _jitter_range("saturation", saturation, 1.0, math.inf),
                _jitter_range("hue", hue, 0.0, 0.5),
            ]
        )
        neutral = np.array([1.0, 1.0, 1.0, 0.0])
        self.active = [k for k in range(4) if not (self.ranges[k] == neutral[k]).all()]

    def parameters(self, uniforms: np.ndarray, sizes: np.ndarray) -> Parameters:
        """Adds `order` (B, 4), the operations in the order they are done (-1: none), and `factors` (B, 4) by operation.

        Factors are float32, since that is what PIL blends with; hue is the whole steps of 1/255 turn that PIL adds.
        """
        apply = uniforms[:, 0] < self.p
        order = np.argsort(uniforms[:, 1:5], axis=1, kind="stable")
        factors = self.ranges[:, 0] + uniforms[:, 5:9] * (self.ranges[:, 1] - self.ranges[:, 0])
        factors[:, HUE] = np.trunc(factors[:, HUE] * 255.0)
        done = apply[:, None] & np.isin(order, self.active)
        factors = np.where(apply[:, None], factors, [1.0, 1.0, 1.0, 0.0])
        return {
            "apply": apply,
            "order": np.where(done, order, -1).astype(np.int32),
            "factors": factors.astype(np.float32),
        }


class RandomGrayscale(Transform):
    """Every channel becomes the picture's grey.

    Args:
        p: probability.
    """

    def __init__(self, p: float = 0.1) -> None:
        super().__init__(p=p)


class GaussianBlur(Transform):
    """A Gaussian whose width is drawn, uniform between the two ends; the border is reflected.

    Args:
        sigma_min: smallest standard deviation in pixels.
        sigma_max: largest standard deviation in pixels.
        p: probability.
    """

    num_draws = 2

    def __init__(self, sigma_min: float = 0.1, sigma_max: float = 2.0, p: float = 0.5) -> None:
        super().__init__(p=p)
        if not 0.0 < sigma_min <= sigma_max:
            raise UsageError(
                f"sigma_min and sigma_max must satisfy 0 < sigma_min <= sigma_max, not {sigma_min}, {sigma_max}"
            )
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def parameters(self, uniforms: np.ndarray, sizes: np.ndarray) -> Parameters:
        """Adds `sigma` (B,), pixels."""
        sigma = self.sigma_min + uniforms[:, 1] * (self.sigma_max - self.sigma_min)
        return {"apply": uniforms[:, 0] < self.p, "sigma": sigma.astype(np.float32)}


class Solarization(Transform):
    """Values at or above a threshold are inverted.

    Args:
        threshold: 0 to 255.
        p: probability.
    """

    def __init__(self, threshold: int = 128, p: float = 0.2) -> None:
        super().__init__(p=p)
        if not 0 <= threshold <= 255:
            raise UsageError(f"threshold must lie between 0 and 255, not {threshold}")
        self.threshold = threshold


class RandomAppliedTrans(Transform):
    """All of a list of transforms, in order, or none of them. Groups nest; each member keeps its own p besides.

    Args:
        transforms: the members.
        p: probability of the whole group.
    """

    def __init__(self, transforms: list[Transform], p: float = 0.5) -> None:
        super().__init__(p=p)
        self.transforms = transforms
        self.num_draws = 1 + sum(t.num_draws for t in transforms)

    def parameters(self, uniforms: np.ndarray, sizes: np.ndarray) -> Parameters:
        """The members' parameters, named `MEMBER.NAME`; where the group does not apply, no member does."""
        gated = np.where(uniforms[:, :1] < self.p, uniforms[:, 1:], _NEVER)
        return chain_parameters(self.transforms, gated, sizes)

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        applied = size
        for transform in self.transforms:
            applied = transform.output_size(applied)
        return applied if self.p == 1.0 or applied == size else size if self.p == 0.0 else None


class SharedTrans(RandomAppliedTrans):
    """Transforms that do the same to all views of a picture in their group of views: their draws are shared.

    Those at the head of a list are done once for each picture.

    Args:
        transforms: the members, in order.
        p: probability of the whole group.
    """

    def __init__(self, transforms: list[Transform], p: float = 1.0) -> None:
        super().__init__(transforms, p)


class Normalize(Transform):
    """(x / 255 - mean) / std for each channel. Last in its list, but for a flip; without it pixels are x / 255.

    Args:
        mean: one number for each of R, G, B.
        std: one number for each of R, G, B.
    """

    num_draws = 0

    def __init__(
        self, mean: Sequence[float] = (0.485, 0.456, 0.406), std: Sequence[float] = (0.229, 0.224, 0.225)
    ) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UsageError("mean and std must each have three numbers, those of std above 0")
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))


def chain_parameters(transforms: Sequence[Transform], uniforms: np.ndarray, sizes: np.ndarray) -> Parameters:
    """Parameters of a list of transforms, each with its own range of draws and the sizes that reach it.

    Args:
        transforms: in order of application.
        uniforms: (B, sum of num_draws).
        sizes: (B, 2) entering the first.

    Returns:
        Every transform's parameters, named `INDEX.NAME`.
    """
    result: Parameters = {}
    first = 0
    for index, transform in enumerate(transforms):
        own = (
            transform.parameters(uniforms[:, first : first + transform.num_draws], sizes) if transform.num_draws else {}
        )
        first += transform.num_draws
        for name, values in own.items():
            result[f"{index}.{name}"] = values
            if name == "size" or name.endswith(".size"):
                sizes = values
    return result


def leaves(transforms: Sequence[Transform], prefix: str = "") -> Iterator[tuple[str, Transform]]:
    """The transforms of a list with its groups opened, each with the prefix of its parameters' names."""
    for index, transform in enumerate(transforms):
        if isinstance(transform, RandomAppliedTrans):
            yield from leaves(transform.transforms, f"{prefix}{index}.")
        else:
            yield f"{prefix}{index}.", transform


@dataclass
class ViewGroup:
    """Views that are made the same way and have the same size.

    Attributes:
        num_views: how many views of each picture.
        transforms: what makes a view of a picture, in order.
    """

    num_views: int = 1
    transforms: list[Transform] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.num_views < 1:
            raise UsageError(f"num_views must be at least 1, not {self.num_views}")
        opened = [transform for _, transform in leaves(self.transforms)]
        normalize = [transform for transform in opened if isinstance(transform, Normalize)]
        if len(normalize) > 1 or any(transform not in self.transforms for transform in normalize):
            raise UsageError("Normalize may stand once in a list of transforms, outside of groups")
        after = opened[opened.index(normalize[0]) + 1 :] if normalize else []
        if not all(isinstance(transform, RandomHorizontalFlip) for transform in after):
            raise UsageError("Normalize must be the last of the transforms (only a flip may follow)")
        self.normalize = normalize[0] if normalize else Normalize(mean=(0, 0, 0), std=(1, 1, 1))
        for inner in (member for transform in self.transforms for member in _members(transform)):
            if isinstance(inner, SharedTrans) or inner.view_draw is not None:
                raise UsageError(f"{type(inner).__name__} must stand in the list of transforms itself, not in a group")
        for transform in opened:
            if isinstance(transform, RandomGridPatch) and transform.grid**2 != self.num_views:
                raise UsageError(f"num_views is {self.num_views}, but RandomGridPatch has {transform.grid**2} cells")
        if self._fixed_size() is None:
            raise UsageError(
                "these transforms leave pictures of different sizes, which cannot form a batch: "
                "give them a RandomResizedCrop, CenterCrop or Resize = [height, width] that always applies"
            )
        for transform in opened:
            if isinstance(transform, GaussianBlur) and min(self.size) <= math.ceil(BLUR_REACH * transform.sigma_max):
                raise UsageError(f"views of {min(self.size)} pixels are too small for a blur of {transform.sigma_max}")

    @cached_property
    def num_draws(self) -> int:
        """Uniform draws of each view of a picture."""
        return sum(transform.num_draws for transform in self.transforms)

    @cached_property
    def shared_draws(self) -> np.ndarray:
        """(num_draws,) bool: which draws all views of a picture have in common."""
        return np.repeat([isinstance(t, SharedTrans) for t in self.transforms], [t.num_draws for t in self.transforms])

    @cached_property
    def view_draws(self) -> list[int]:
        """Which draws say what view of the group it is; see `Transform.view_draw`."""
        starts = itertools.accumulate((transform.num_draws for transform in self.transforms), initial=0)
        return [start + t.view_draw for start, t in zip(starts, self.transforms) if t.view_draw is not None]  # noqa: B905

    @cached_property
    def steps(self) -> list[tuple[str, Transform]]:
        """What changes pixels, in order, with the prefix of its parameters; groups opened, Normalize left out."""
        return [(prefix, t) for prefix, t in leaves(self.transforms) if not isinstance(t, Normalize)]

    @cached_property
    def num_geometric(self) -> int:
        """How many of the first steps only move pixels."""
        kinds = [transform.geometric for _, transform in self.steps]
        return kinds.index(False) if False in kinds else len(kinds)

    @cached_property
    def num_common(self) -> int:
        """How many of the first steps do the same to all views, where there are several: they are done once."""
        leading = itertools.takewhile(lambda transform: isinstance(transform, SharedTrans), self.transforms)
        return len(list(leaves(list(leading)))) if self.num_views > 1 else 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every view."""
        size = self._fixed_size()
        assert size is not None
        return size

    def _fixed_size(self) -> tuple[int, int] | None:
        size: tuple[int, int] | None = None
        for transform in self.transforms:
            size = transform.output_size(size)
        return size


def _members(transform: Transform) -> list[Transform]:
    """What stands in a group, at any depth."""
    own = transform.transforms if isinstance(transform, RandomAppliedTrans) else []
    return [*own, *(inner for member in own for inner in _members(member))]


def _pair_of_pixels(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise UsageError(f"{name} must be a number of pixels or [height, width], each at least 1, not {value}")
    return pair


def _range(name: str, value: Sequence[float], least: float, most: float) -> tuple[float, float]:
    if len(value) != 2 or not least <= value[0] <= value[1] <= most:
        raise UsageError(f"{name} must be [smallest, largest] within {least} and {most}, not {list(value)}")
    return float(value[0]), float(value[1])


def _jitter_range(name: str, value: float | Sequence[float], neutral: float, most: float) -> tuple[float, float]:
    if isinstance(value, Sequence):
        return _range(name, value, neutral - 1.0 if neutral else -most, most)
    if not 0 <= value <= most:
        raise UsageError(f"{name} must lie between 0 and {most}, not {value}")
    return (max(0.0, neutral - value), neutral + value) if neutral else (-value, value)
