"""What a kernel has to know of the device that it runs on."""

import functools
import os

import torch
import triton.language as tl
from torch import Tensor

# Triton's interpreter runs the kernels on CPU tensors; it has to be switched on before any kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

KERNEL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def runs_triton(*tensors: Tensor) -> bool:
    """Whether Triton can take these tensors: on a GPU, or interpreted, and no dtype that the kernels do not know."""
    is_reachable = INTERPRETED or all(x.is_cuda for x in tensors)
    return is_reachable and all(x.dtype in KERNEL_DTYPES or not x.is_floating_point() for x in tensors)


def operand_dtype(dtype: torch.dtype) -> tl.dtype:
    """What matrix products of a kernel multiply for tensors of `dtype`; they add up in float32 always."""
    if INTERPRETED and dtype == torch.bfloat16:
        return tl.float32  # the interpreter multiplies bfloat16 as integers
    return KERNEL_DTYPES[dtype]


def product_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as torch.get_float32_matmul_precision says; TF32 thrice is about float32."""
    return "tf32x3" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors, to size grids by; an H100's where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
