"""What transforms do to pixels, as a table that `pixels.c` on the CPU and `sslkernels.views` on a GPU read.

A transform whose arithmetic is made of the operations below says so (`Transform.operations`); then the exact stage need
not run its torch form. Operations act on whole numbers from 0 to 255 and result in such, so a list of operations may be
cut anywhere, with bytes in between, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sslrun.errors import UsageError

# Codes of the operations, as in pixels.c and sslkernels.views (which knows no FLIP: flips stand beside the table).
NOTHING = -1
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, SOLARIZE, BLUR, FLIP = range(8)


@dataclass(frozen=True)
class Operation:
    """One operation on each of N images, or k operations one after the other.

    Only the entries of the arrays may depend on the images: what is compiled for a recipe depends on the rest.

    Attributes:
        kinds: the codes that can occur, each at most once for an image.
        codes: (N,) or (N, k) int, what to do to each image; NOTHING leaves it alone.
        values: factors, hue steps or threshold: a number, or of the shape of `codes`.
        taps: for BLUR, which stands alone, the weights of the horizontal and of the vertical pass for the M images that
            are blurred, in order: (2, M, taps), center first.
    """

    kinds: tuple[int, ...]
    codes: np.ndarray
    values: Any = 0.0
    taps: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.kinds) > 1 and not {BLUR, FLIP}.isdisjoint(self.kinds):
            raise UsageError("a blur or a flip is an operation of its own, not one of several kinds")


@dataclass(frozen=True)
class Program:
    """Operations on N images as one table.

    Attributes:
        codes: (N, K) int32.
        values: (N, K) float32: factor, steps, threshold, or row of `taps` of a blur.
        taps: (2, rows, taps) float32; None where no image can be blurred.
        reaches: (rows,) int32, taps in use beside the center.
        flips: (N,) bool, whether the image ends up flipped.
    """

    codes: np.ndarray
    values: np.ndarray
    taps: np.ndarray | None
    reaches: np.ndarray
    flips: np.ndarray


def applied(kind: int, apply: np.ndarray, value: float = 0.0, taps: np.ndarray | None = None) -> Operation:
    """The operation `kind` on the images where `apply` (N,) is true."""
    return Operation((kind,), np.where(apply, kind, NOTHING), value, taps)


def program(operations: Sequence[Operation], count: int) -> Program:
    """The operations on N images, N = `count`. All flips are done at the end, since no other operation depends on the
    position of a pixel."""
    others = [operation for operation in operations if operation.kinds != (FLIP,)]
    widths = [1 if operation.codes.ndim == 1 else operation.codes.shape[1] for operation in others]
    codes = np.empty((count, sum(widths)), dtype=np.int32)
    values = np.empty(codes.shape, dtype=np.float32)
    taps: list[np.ndarray] = []
    first, rows = 0, 0
    for operation, width in zip(others, widths, strict=True):
        columns = slice(first, first + width)
        own = operation.codes.reshape(count, width)
        numbers = operation.values
        if operation.taps is not None:
            numbers = rows - 1 + np.cumsum(own == BLUR, axis=0)
            rows += operation.taps.shape[1]
            taps.append(operation.taps)
        codes[:, columns] = own
        values[:, columns] = numbers if np.ndim(numbers) == 0 else np.reshape(numbers, (count, width))
        first += width
    flips = np.zeros(count, dtype=bool)
    for operation in operations:
        if operation.kinds == (FLIP,):
            flips ^= operation.codes == FLIP
    if not taps:
        return Program(codes, values, None, np.zeros(0, dtype=np.int32), flips)
    widest = max(part.shape[2] for part in taps)
    joined = np.zeros((2, rows, widest), dtype=np.float32)
    first = 0
    for part in taps:
        joined[:, first : first + part.shape[1], : part.shape[2]] = part
        first += part.shape[1]
    reaches = ((joined[0] != 0) * np.arange(widest, dtype=np.int32)).max(axis=1)
    return Program(codes, values, joined, reaches, flips)


def passes(operations: Sequence[Operation]) -> list[list[Operation]]:
    """The operations in lists that `sslkernels.views` does at once: with a contrast and a blur at most, and after the
    blur only what treats each channel by itself. At least one list."""
    result: list[list[Operation]] = [[]]
    for operation in operations:
        kinds = set(operation.kinds)
        before = [kind for own in result[-1] for kind in own.kinds]
        has_another_contrast = CONTRAST in before and CONTRAST in kinds
        if has_another_contrast or (BLUR in before and not kinds <= {BRIGHTNESS, SOLARIZE, FLIP}):
            result.append([])
        result[-1].append(operation)
    return result
