"""`pixels.c`: color operations, flips and normalization in C for the CPU, compiled on first use and kept in the cache.

An accelerator of the exact stage: the operations that a transform names (`operations.py`) give the bits of its torch
form, so which of the two runs is no part of a recipe. It is three times as fast: bytes instead of floats in memory, one
call for all operations of a block of images, and no hold on Python's lock. `torch.compile` was measured before: half a
minute of compilation, not half a second, for kernels that keep the lock. Without a C compiler the torch forms do the
work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sslrun.data.index import cache_dir
from sslrun.data.operations import Program

if TYPE_CHECKING:
    from torch import Tensor

_SOURCE = Path(__file__).with_name("pixels.c")
# No contraction to fused multiply-adds: the bits are to be those of torch, which has none there.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


@cache
def c_functions() -> Any | None:
    """The compiled functions; None where there is no compiler, or none that works."""
    compiler = _compiler()
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


def run(program: Program, pixels: Tensor, rows: slice, out: Tensor, scales: Tensor | None = None) -> None:
    """Runs a program on a block of images.

    Args:
        program: of the whole group of views.
        pixels: (n, 3, h, w) uint8, contiguous as channels-last.
        rows: which of the program's images these are.
        out: (n, 3, h, w), contiguous as channels-last, to be filled: float32 if it is normalized, otherwise uint8.
        scales: (2, 3) float32, scale and offset of each channel; None leaves bytes.
    """
    count, _, height, width = pixels.shape
    horizontal, vertical = np.zeros((2, 1, 1), dtype=np.float32) if program.taps is None else program.taps
    taps = horizontal.shape[1]
    assert pixels.permute(0, 2, 3, 1).is_contiguous() and out.permute(0, 2, 3, 1).is_contiguous()
    planes = np.empty(3 * height * width, dtype=np.uint8)
    scratch = np.empty((height + 2) * (width + 2 * taps), dtype=np.float32)
    functions = c_functions()
    assert functions is not None

    def numpy(array: np.ndarray) -> ctypes.c_void_p:
        assert array.flags.c_contiguous
        return ctypes.c_void_p(array.ctypes.data)

    def torch_(tensor: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    long = ctypes.c_long
    scale, offset = (None, None) if scales is None else scales
    floats, as_bytes = (None, out) if scales is None else (out, None)
    functions.sslrun_views(
        *(torch_(pixels), long(count), long(height), long(width)),
        *(numpy(program.codes[rows]), numpy(program.values[rows]), long(program.codes.shape[1])),
        *(numpy(horizontal), numpy(vertical), numpy(program.reaches), long(taps)),
        *(numpy(program.flips[rows]), torch_(scale), torch_(offset), numpy(planes), numpy(scratch)),
        *(torch_(floats), torch_(as_bytes)),
    )
