"""What is compiled ahead of time: calls on meta tensors that launch each kernel as real shapes launch it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sslkernels import ema_update


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# "operation: what distinguishes this launch" -> the call
LAUNCHES: dict[str, Callable[[], Any]] = {}


def _ema_update(teacher: torch.dtype, student: torch.dtype, size: int, momentum: float | Tensor) -> None:
    ema_update._launch([(_meta(size, dtype=teacher), _meta(size, dtype=student))], momentum)


LAUNCHES |= {
    "ema_update: float32": lambda: _ema_update(torch.float32, torch.float32, 2048 * 512, 0.99),
    "ema_update: float32, momentum on the device": lambda: _ema_update(
        torch.float32, torch.float32, 2048 * 512, _meta()
    ),
    "ema_update: float32, sizes that are not aligned": lambda: _ema_update(torch.float32, torch.float32, 4095, 0.99),
    "ema_update: float32 after bfloat16": lambda: _ema_update(torch.float32, torch.bfloat16, 2048 * 512, 0.99),
    "ema_update: bfloat16": lambda: _ema_update(torch.bfloat16, torch.bfloat16, 2048 * 512, 0.99),
}
