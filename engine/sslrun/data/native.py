"""`pixels.c` and `resample.c`: what views are made of, in C for the CPU, compiled on first use and kept in the cache.

An accelerator of the exact stage: crops that resize, and the operations that a transform names (`operations.py`), give
the bits of their torch form, so which of the two runs is no part of a recipe. It is three times as fast: bytes instead
of floats in memory, one call for all that is done to a block of images, and no hold on Python's lock. `torch.compile`
was measured before: half a minute of compilation, not half a second, for kernels that keep the lock. Without a C
compiler the torch forms do the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sslrun.data.index import cache_dir
from sslrun.data.operations import Program
from sslrun.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

_SOURCES = [Path(__file__).with_name(name) for name in ("pixels.c", "resample.c", "resample.h")]
# No contraction to fused multiply-adds: the bits are to be those of torch, which has none there.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


@cache
def c_functions() -> Any | None:
    """The compiled functions; None where there is no compiler, or none that works."""
    compiler = _compiler()
    if compiler is None:
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout
    sources = b"".join(source.read_bytes() for source in _SOURCES)
    key = hashlib.sha256(sources + repr(_FLAGS).encode() + version + _processor()).hexdigest()[:16]
    try:
        path = _compiled(compiler, cache_dir(), key)
    except OSError:  # no home, or one that cannot be written to
        with tempfile.TemporaryDirectory() as folder:
            path = _compiled(compiler, Path(folder), key)
            return None if path is None else _loaded(path)
    return None if path is None else _loaded(path)


def is_expected() -> bool:
    """Whether there is a compiler; asked by a dry run, which compiles nothing."""
    return _compiler() is not None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")


def _compiled(compiler: str, folder: Path, key: str) -> Path | None:
    path = folder / f"pixels-{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"pixels-{key}.{os.getpid()}.so"  # other ranks may be compiling the same
    sources = [str(source) for source in _SOURCES if source.suffix == ".c"]
    if subprocess.run([compiler, *_FLAGS, "-o", str(beside), *sources], capture_output=True).returncode != 0:
        return None
    os.replace(beside, path)
    return path


def _loaded(path: Path) -> Any:
    functions = ctypes.CDLL(str(path))
    functions.sslrun_work.restype = ctypes.c_long
    return functions


def _processor() -> bytes:
    """What `-march=native` depends on: a cache may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    except OSError:
        return platform.processor().encode()
    return b"".join(line for line in lines if line.startswith((b"model", b"flags", b"Features", b"CPU ")))


@dataclass(frozen=True)
class Boxes:
    """Boxes of images, each to be resized to a view.

    Attributes:
        images: (H, W, 3) uint8 of each view, of any sizes; a pixel's bytes lie side by side, and so do a row's pixels.
        boxes: (n, 4) int32, top, left, height and width.
        interpolation: "bilinear" or "bicubic".
    """

    images: Sequence[Tensor]
    boxes: np.ndarray
    interpolation: str


class _Work(threading.local):
    """Memory to work in, a thread's own, kept: new pages for every block of views would cost more than the work."""

    def __init__(self) -> None:
        self._memory: dict[str, np.ndarray] = {}

    def bytes(self, name: str, count: int) -> ctypes.c_void_p:
        """The address of `count` bytes or more, a multiple of 64."""
        memory = self._memory.get(name)
        if memory is None or len(memory) < count + 64:
            memory = self._memory[name] = np.empty(count + 64, dtype=np.uint8)
        return ctypes.c_void_p(-(-memory.ctypes.data // 64) * 64)


_work = _Work()


def run(program: Program, pixels: Tensor | Boxes, rows: slice, out: Tensor, scales: Tensor | None = None) -> None:
    """Runs a program on a block of images.

    Args:
        program: of the whole group of views.
        pixels: (n, 3, h, w) uint8, contiguous as channels-last, or what is to be resized to that.
        rows: which of the program's images these are.
        out: (n, 3, h, w), contiguous as channels-last, to be filled: float32 if it is normalized, otherwise uint8.
        scales: (2, 3) float32, scale and offset of each channel; None leaves bytes.

    Raises:
        UsageError: a box is not inside its image.
    """
    count, _, height, width = out.shape
    horizontal, vertical = np.zeros((2, 1, 1), dtype=np.float32) if program.taps is None else program.taps
    taps = horizontal.shape[1]
    assert out.permute(0, 2, 3, 1).is_contiguous()
    functions = c_functions()
    assert functions is not None

    def numpy(array: np.ndarray) -> ctypes.c_void_p:
        assert array.flags.c_contiguous
        return ctypes.c_void_p(array.ctypes.data)

    def torch_(tensor: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    long, none = ctypes.c_long, ctypes.c_void_p(None)
    size = long(count), long(height), long(width)
    if isinstance(pixels, Boxes):
        images, boxes = pixels.images, np.ascontiguousarray(pixels.boxes, dtype=np.int32)
        assert all(image.stride()[1:] == (3, 1) or image.shape[1] == 1 for image in images)
        assert len(images) == len(boxes) == count
        _check(boxes, images)
        addresses = np.array([image.data_ptr() for image in images], dtype=np.uintp)
        strides = np.array([image.stride(0) for image in images], dtype=np.int64)
        kind = ctypes.c_int(("bilinear", "bicubic").index(pixels.interpolation))
        work = _work.bytes("resize", functions.sslrun_work(numpy(boxes), *size, kind))
        source = (numpy(addresses), numpy(strides), numpy(boxes), kind, work, none)
    else:
        assert pixels.shape == out.shape and pixels.permute(0, 2, 3, 1).is_contiguous()
        source = (none, none, none, ctypes.c_int(0), none, torch_(pixels))
    scale, offset = (None, None) if scales is None else scales
    floats, as_bytes = (None, out) if scales is None else (out, None)
    functions.sslrun_views(
        *(*source, *size),
        *(numpy(program.codes[rows]), numpy(program.values[rows]), long(program.codes.shape[1])),
        *(numpy(horizontal), numpy(vertical), numpy(program.reaches), long(taps)),
        *(numpy(program.flips[rows]), torch_(scale), torch_(offset)),
        *(_work.bytes("planes", 3 * height * width), _work.bytes("blur", 4 * (height + 2) * (width + 2 * taps))),
        *(torch_(floats), torch_(as_bytes)),
    )


def _check(boxes: np.ndarray, images: Sequence[Tensor]) -> None:
    """Nothing if all boxes lie in their images: C does not look."""
    sizes = np.array([image.shape[:2] for image in images])
    inside = (boxes[:, :2] >= 0) & (boxes[:, 2:] > 0) & (boxes[:, :2] + boxes[:, 2:] <= sizes)
    for row in np.flatnonzero(~inside.all(axis=1)).tolist():
        top, left, height, width = boxes[row].tolist()
        raise UsageError(
            f"a crop of {height}x{width} pixels at row {top}, column {left} is not inside its image of "
            f"{sizes[row][0]}x{sizes[row][1]}: the source or the transform states another size"
        )
