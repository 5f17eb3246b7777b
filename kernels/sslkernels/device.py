"""Properties of the device that kernels run on."""

import functools
import os
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import triton.language as tl
from torch import Tensor

# Triton's interpreter runs the kernels on CPU tensors. It must be switched on before any kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ASSUMED_ARCHITECTURE = 90  # without a GPU: the architecture to compile for ahead of time

P = ParamSpec("P")
R = TypeVar("R")

KERNEL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def outside_autocast(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Decorator that switches autocast off within `function`, which chooses its dtypes itself."""

    @functools.wraps(function)
    def call(first: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        device_type = first.device.type if isinstance(first, Tensor) else "cpu"
        with torch.autocast(device_type, enabled=False):
            return function(first, *args, **kwargs)

    return call


def runs_triton(*tensors: Tensor) -> bool:
    """Whether the kernels support these tensors: on a GPU or interpreted, with dtypes that the kernels know."""
    is_reachable = INTERPRETED or all(x.is_cuda for x in tensors)
    return is_reachable and all(x.dtype in KERNEL_DTYPES or not x.is_floating_point() for x in tensors)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches a Triton kernel on the device of its tensors; Triton itself takes the current device, whichever it is.

    Args:
        kernel: a function compiled by `triton.jit`.
        grid: numbers of programs.
        args: the kernel's arguments, at least one of them a tensor, and all tensors on one device.
        options: further arguments by name, and Triton's options.
    """
    first, *others = (arg for arg in args if isinstance(arg, Tensor))
    assert all(x.device == first.device for x in others), "a kernel's tensors are on one device"
    with torch.cuda.device_of(first):
        kernel[grid](*args, **options)


def operand_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of the operands of a kernel's matrix products for tensors of `dtype`. Sums are always in float32."""
    if INTERPRETED and dtype == torch.bfloat16:
        return tl.float32  # the interpreter multiplies bfloat16 as integers
    return KERNEL_DTYPES[dtype]


def processors(device: torch.device) -> int:
    """Number of streaming multiprocessors, for grid sizes: of an H100 without a GPU, a few in the interpreter."""
    if device.type == "cuda":
        return _properties(device).multi_processor_count
    return 4 if INTERPRETED else 132


def architecture(device: torch.device) -> int:
    """Compute capability times 10: 80 for Ampere, 90 for Hopper."""
    return 10 * _properties(device).major if device.type == "cuda" else ASSUMED_ARCHITECTURE


@functools.cache
def _properties(device: torch.device):  # type: ignore[no-untyped-def]
    return torch.cuda.get_device_properties(device)
