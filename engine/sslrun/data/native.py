"""The exact stage's colors in C, for the CPU: `pixels.c`, compiled on first use and kept in the user's cache.

It is the arithmetic of the torch form in `pixels.py`, bit for bit, so which of the two runs is no part of a recipe. It
is here because it is three times as fast: bytes instead of floats in memory, one call for all operations of a block of
images, and no hold on Python's lock. `torch.compile` was measured before: half a minute of compilation, not half a
second, for kernels that keep the lock. Without a C compiler the torch form does the work.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslrun.data.index import cache_dir
from sslrun.data.pixels import blur_taps
from sslrun.data.transforms import (
    ColorJitter,
    GaussianBlur,
    Parameters,
    RandomGrayscale,
    RandomHorizontalFlip,
    Solarization,
    Transform,
)

_SOURCE = Path(__file__).with_name("pixels.c")
# No contraction to fused multiply-adds: the bits are to be those of torch, which has none there.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")

# As in pixels.c; the first four are the jitter's own numbers.
_GRAY, _SOLARIZE, _BLUR = 4, 5, 6


@dataclass(frozen=True)
class Instructions:
    """What C is told of N images.

    Attributes:
        operations: (N, steps) int32, -1 for nothing.
        values: (N, steps) float32: factor, threshold, or row of the blur's taps.
        horizontal: (rows, taps) float32, center first.
        vertical: the same.
        reaches: (rows,) int32, taps in use beside the center.
        flips: (N,) uint8.
    """

    operations: np.ndarray
    values: np.ndarray
    horizontal: np.ndarray
    vertical: np.ndarray
    reaches: np.ndarray
    flips: np.ndarray


@cache
def c_functions() -> Any | None:
    """The compiled functions; None where there is no compiler, or none that works."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout
    key = hashlib.sha256(_SOURCE.read_bytes() + repr(_FLAGS).encode() + version + _processor()).hexdigest()[:16]
    try:
        path = _compiled(compiler, cache_dir(), key)
    except OSError:  # no home, or one that cannot be written to
        with tempfile.TemporaryDirectory() as folder:
            path = _compiled(compiler, Path(folder), key)
            return None if path is None else ctypes.CDLL(str(path))
    return None if path is None else ctypes.CDLL(str(path))


def _compiled(compiler: str, folder: Path, key: str) -> Path | None:
    path = folder / f"pixels-{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"pixels-{key}.{os.getpid()}.so"  # other ranks may be compiling the same
    if subprocess.run([compiler, *_FLAGS, "-o", str(beside), str(_SOURCE)], capture_output=True).returncode != 0:
        return None
    os.replace(beside, path)
    return path


def _processor() -> bytes:
    """What `-march=native` depends on: a cache may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    except OSError:
        return platform.processor().encode()
    return b"".join(line for line in lines if line.startswith((b"model", b"flags", b"Features", b"CPU ")))


def instructions(steps: Sequence[tuple[Transform, Parameters]], count: int) -> Instructions | None:
    """The steps of `count` images as C takes them; None where it does not know one of them.

    Args:
        steps: colors and flips in order, each with its parameters.
        count: N.
    """
    columns: list[tuple[np.ndarray, np.ndarray]] = []
    taps: list[tuple[np.ndarray, np.ndarray]] = []
    flips = np.zeros(count, dtype=bool)

    def add(apply: np.ndarray, operation: int, values: Any) -> None:
        columns.append((np.where(apply, operation, -1), np.broadcast_to(values, count)))

    for transform, numbers in steps:
        if isinstance(transform, ColorJitter):
            for order in numbers["order"].T:
                columns.append((order, numbers["factors"][np.arange(count), order]))
        elif isinstance(transform, RandomGrayscale):
            add(numbers["apply"], _GRAY, 0.0)
        elif isinstance(transform, Solarization):
            add(numbers["apply"], _SOLARIZE, transform.threshold)
        elif isinstance(transform, GaussianBlur):
            add(numbers["apply"], _BLUR, np.arange(count) + count * len(taps))
            taps.append(blur_taps(numbers["sigma"]))
        elif isinstance(transform, RandomHorizontalFlip):
            flips ^= numbers["apply"]
        else:
            return None
    widest = max((h.shape[1] for h, _ in taps), default=1)

    def joined(which: int) -> np.ndarray:
        padded = [np.pad(pair[which], ((0, 0), (0, widest - pair[which].shape[1]))) for pair in taps]
        return np.ascontiguousarray(np.concatenate(padded) if padded else np.zeros((1, 1)), dtype=np.float32)

    horizontal, vertical = joined(0), joined(1)
    return Instructions(
        operations=_table([operations for operations, _ in columns], count, np.int32),
        values=_table([values for _, values in columns], count, np.float32),
        horizontal=horizontal,
        vertical=vertical,
        reaches=(horizontal != 0).cumsum(axis=1).argmax(axis=1).astype(np.int32),
        flips=flips.astype(np.uint8),
    )


def _table(columns: list[np.ndarray], count: int, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(np.stack(columns, axis=1) if columns else np.zeros((count, 0)), dtype=dtype)


def run(
    pixels: torch.Tensor, told: Instructions, rows: slice, scale: torch.Tensor, offset: torch.Tensor, out: torch.Tensor
) -> None:
    """Colors, flips and normalizes a block.

    Args:
        pixels: (n, 3, h, w) uint8, contiguous as channels-last.
        told: instructions of the whole group.
        rows: which of its images these are.
        scale: three float32.
        offset: three float32.
        out: (n, 3, h, w) float32, contiguous as channels-last.
    """
    count, _, height, width = pixels.shape
    taps = told.horizontal.shape[1]
    assert pixels.permute(0, 2, 3, 1).is_contiguous() and out.permute(0, 2, 3, 1).is_contiguous()
    planes = np.empty(3 * height * width, dtype=np.uint8)
    scratch = np.empty((height + 2) * (width + 2 * taps), dtype=np.float32)
    functions = c_functions()
    assert functions is not None

    def numpy(array: np.ndarray) -> ctypes.c_void_p:
        assert array.flags.c_contiguous
        return ctypes.c_void_p(array.ctypes.data)

    def torch_(tensor: torch.Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    long = ctypes.c_long
    functions.sslrun_views(
        *(torch_(pixels), long(count), long(height), long(width)),
        *(numpy(told.operations[rows]), numpy(told.values[rows]), long(told.operations.shape[1])),
        *(numpy(told.horizontal), numpy(told.vertical), numpy(told.reaches), long(taps)),
        *(numpy(told.flips[rows]), torch_(scale), torch_(offset), numpy(planes), numpy(scratch), torch_(out)),
    )
