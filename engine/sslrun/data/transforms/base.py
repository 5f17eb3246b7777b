"""The contract of a transform: how its draws become numbers, and the forms in which it changes pixels.

A transform is one class in one file. It states what it does to each image as `Numbers`, a pure function of uniform
draws, and gives the pixel arithmetic in one or more forms, each a method:

    torch_image    one image at a time, bytes; may change the shape
    torch_block    a block of images of one size, floats; keeps the shape
    dali           operators in a DALI graph; may change the shape
    operations     operations of `operations.py`: C and Triton do them instead of `torch_block`
    pil            one PIL image: the reference that the other forms are compared with

A form that a transform does not have is None. One of the two torch forms, or `dali`, is enough: `data/split.py` says
which steps of a view DALI does and which torch does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sslrun.config.component import Component
from sslrun.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from sslrun.data.operations import Operation

Box = tuple[float, float, float, float]  # top, left, height, width


@dataclass  # not frozen: `rows` makes one for every image and step, and a frozen one takes a third longer
class Numbers:
    """What one transform does to each of N images.

    Attributes:
        apply: (N,) bool, whether the transform changes the image.
        size: (N, 2) int, height and width of the image after the transform.
        values: the transform's own numbers, (N,) or (N, k), under names of its own. Only the transform reads them.
    """

    apply: np.ndarray
    size: np.ndarray
    values: dict[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        """One of the transform's own numbers."""
        return self.values[name]

    def rows(self, rows: slice | int | np.ndarray) -> Numbers:
        """The numbers of some of the images; of one image, without the dimension N, where `rows` is an integer."""
        return Numbers(self.apply[rows], self.size[rows], {name: own[rows] for name, own in self.values.items()})


class Transform(Component, kind="transforms"):
    """One step of a view.

    Args:
        p: probability that an image is changed at all, 0 to 1.
    """

    num_draws: int = 1
    """Uniform draws that each image consumes. The first one decides whether the transform applies."""

    view_draw: int | None = None
    """Index of the draw that is not random but encodes the view: view v of V has (v + 0.5) / V there. None: no draw."""

    num_views: int | None = None
    """Number of views that the group of this transform must have; None where any number will do."""

    shared: bool = False
    """Whether all views of an image share the draws."""

    geometric: bool = False
    """Whether it only moves pixels. In exact mode on a GPU, DALI does the leading geometric steps."""

    is_flip: bool = False
    """Whether it exchanges left and right, and does nothing else; its `torch_block` then takes uint8 too."""

    ignores_flips: bool = False
    """Whether a flip before the transform gives the same image as a flip after it. A flip may then change places with
    it, which saves time. Never true of a transform that depends on the position of a pixel."""

    dali_frames: bool = False
    """Whether its `dali` form also takes the views of an image all at once, as the frames of a sequence, for which most
    operators run once instead of once for each view. Only for a form that keeps the size of images and does not branch:
    its images are then (V, H, W, 3), of layout FHWC, and its nodes have V first, with F as the first letter of their
    layout."""

    # The forms. Each is a method or None.

    torch_image: Callable[[Tensor, Numbers], Tensor] | None = None
    """`torch_image(image, numbers)`: (1, C, H, W) uint8, any strides, not to be written to -> (1, C, h, w) uint8 on the
    same device, of the size that `numbers` states. Called for an image to which the transform applies, with its own
    numbers (each a number or (k,))."""

    torch_block: Callable[[Tensor, Numbers], Tensor] | None = None
    """`torch_block(x, numbers)`: (N, C, H, W) float32, contiguous, whole numbers from 0 to 255, may be written to ->
    the same shape. Called with the images to which the transform applies, and with their numbers. The result is cut to
    whole numbers from 0 to 255, as PIL does; a transform that has operations too must do so by itself."""

    dali: Callable[[Any, dict[str, Any]], Any] | None = None
    """`dali(image, nodes)`: node of HWC uint8 images -> node of HWC uint8 images. Called for all images: where one must
    be left alone, the form says so (`if nodes["apply"]:`). `nodes` are those of `dali_arguments`. The code is converted
    by DALI's AutoGraph, which needs a source file and cannot read `super()` or functools."""

    operations: Callable[[Numbers], list[Operation]] | None = None
    """`operations(numbers)`: the operations of `operations.py` that give the bits of `torch_block`, in order. C does
    them on the CPU and Triton on a GPU. Their number and kinds are the same for all numbers."""

    pil: Callable[[Image.Image, Numbers], Image.Image] | None = None
    """`pil(image, numbers)`: RGB image -> RGB image. Called for an image to which the transform applies."""

    def __init__(self, *, p: float = 1.0) -> None:
        if not 0.0 <= p <= 1.0:
            raise UsageError(f"p must lie between 0 and 1, not {p}")
        self.p = float(p)

    def numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> Numbers:
        """What to do to each image, as a pure function of its draws.

        Where `apply` is False, the size must be the one that enters, and the values must be such that a form which
        uses them without asking changes nothing.

        Args:
            uniforms: (N, num_draws) in [0, 1).
            sizes: (N, 2) height and width of the images as they enter this transform.
        """
        return Numbers(uniforms[:, 0] < self.p, sizes)

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        """Height and width that every image has afterwards; None where they differ from image to image.

        Args:
            size: what every image has before, or None.

        Raises:
            UsageError: the transform cannot take images of this size.
        """
        return size

    def check_channels(self, channels: int) -> None:
        """Do nothing if the transform can change images of this number of channels.

        Raises:
            UsageError: it cannot: it mixes channels as red, green and blue, and there are others.
        """

    def dali_arguments(self, numbers: Numbers) -> dict[str, np.ndarray]:
        """The arrays, (N,) or (N, k), that the `dali` form takes as nodes under the same names."""
        return {"apply": numbers.apply, **numbers.values}

    def describe(self, numbers: Numbers) -> dict[str, Any]:
        """What the transform does to one image, for people and for JSON: plain values, names that end with the unit.

        Args:
            numbers: one image's, to which the transform applies.
        """
        return {name: np.asarray(value).tolist() for name, value in numbers.values.items()}

    def part_shown(self, numbers: Numbers, size: tuple[int, int]) -> Box | None:
        """The part of the entering image that the result shows: top, left, height, width in pixels; None where that is
        not an upright box. A flip has its left at the right edge and a negative width.

        Args:
            numbers: one image's, to which the transform applies.
            size: height and width of the entering image.
        """
        is_in_place = not self.geometric and tuple(numbers.size.tolist()) == size
        return (0.0, 0.0, float(size[0]), float(size[1])) if is_in_place else None

    # What groups of transforms override.

    def steps(self) -> list[Transform]:
        """The transforms that change pixels: itself, or what it consists of, groups opened."""
        return [self]

    def members(self) -> list[Transform]:
        """The transforms in a group, at any depth."""
        return []

    def step_numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> list[Numbers]:
        """`numbers` of each of the `steps`."""
        numbers = self.numbers(uniforms, sizes)
        if numbers.apply.shape != sizes.shape[:1] or numbers.size.shape != sizes.shape:
            raise UsageError(
                f"{type(self).__name__}.numbers gives apply of shape {numbers.apply.shape} and size of shape "
                f"{numbers.size.shape}, expected {sizes.shape[:1]} and {sizes.shape}"
            )
        return [numbers]


def chain_numbers(transforms: Sequence[Transform], uniforms: np.ndarray, sizes: np.ndarray) -> list[Numbers]:
    """Numbers of a list of transforms, each with its own range of draws and the sizes that reach it.

    Args:
        transforms: in order of application.
        uniforms: (N, sum of num_draws).
        sizes: (N, 2) entering the first.

    Returns:
        The numbers of each transform's `steps`, in order.
    """
    result: list[Numbers] = []
    first = 0
    for transform in transforms:
        own = transform.step_numbers(uniforms[:, first : first + transform.num_draws], sizes)
        first += transform.num_draws
        sizes = own[-1].size if own else sizes
        result += own
    return result


def size_with_probability(
    p: float, applied: tuple[int, int] | None, left_alone: tuple[int, int] | None
) -> tuple[int, int] | None:
    """`output_size` of a transform that gives one size where it applies and another where it does not."""
    return applied if p == 1.0 or applied == left_alone else left_alone if p == 0.0 else None


def per_image(values: np.ndarray, x: Tensor) -> Tensor:
    """Numbers of N images, (N,) or (N, k), as a tensor (N, 1, 1, 1) or (N, k, 1, 1, 1) on the device of `x`."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(x.device, non_blocking=True)[..., None, None, None]


def dali_types() -> Any:
    """`nvidia.dali.types`, whose constants are made at run time: no type checker finds them."""
    from nvidia.dali import types

    return types


def pair_of_pixels(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of an argument that is one number for a square, or both."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise UsageError(f"{name} must be a number of pixels or [height, width], each at least 1, not {value}")
    return pair


def within(name: str, value: Sequence[float], least: float, most: float) -> tuple[float, float]:
    """Both ends of an argument `[smallest, largest]`."""
    if len(value) != 2 or not least <= value[0] <= value[1] <= most:
        raise UsageError(f"{name} must be [smallest, largest] within {least} and {most}, not {list(value)}")
    return float(value[0]), float(value[1])


def box_in_words(box: Sequence[int]) -> dict[str, int]:
    """Top, left, height and width as `describe` gives them."""
    return {f"{name}_px": int(n) for name, n in zip(("top", "left", "height", "width"), box, strict=True)}
