"""What is compiled ahead of time: calls on meta tensors that launch each kernel as real shapes launch it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# "operation: what distinguishes this launch" -> the call
LAUNCHES: dict[str, Callable[[], Any]] = {}
