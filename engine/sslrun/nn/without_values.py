"""Copies of a module whose tensors have shapes and no memory, to see what it returns without computing it."""

import copy
from typing import TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def without_values(module: AnyModule, mode: FakeTensorMode) -> AnyModule:
    """A copy of a module, whose parameters and buffers are tensors without memory.

    Args:
        module: any module.
        mode: it makes the tensors; the copy runs within it.
    """
    memo = {}
    for tensor in (*module.parameters(), *module.buffers()):
        with mode:
            fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    return copy.deepcopy(module, memo)
