"""Copies of a module whose tensors have shapes and no memory, to see what it returns without computing it."""

import copy
from typing import TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def without_values(module: AnyModule, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> AnyModule:
    """A copy of a module, whose parameters and buffers are tensors without memory.

    Args:
        module: any module.
        mode: it makes the tensors; the copy runs within it.
        dtype: of its floating-point tensors; None for their own.
    """
    memo = {}
    for tensor in (*module.parameters(), *module.buffers()):
        with mode:
            own = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
            fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=own)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    return copy.deepcopy(module, memo)
