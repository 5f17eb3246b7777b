"""Checks of arguments. Each failure is one line that names the argument and what was expected."""

import math

import torch
from torch import Tensor


def check_matrix(name: str, x: Tensor, *, rows: int | None = None, columns: int | None = None) -> None:
    """Raise ValueError unless `x` is a non-empty floating (rows, columns) tensor."""
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{name}: expected a 2-d floating tensor, got {describe(x)}")
    if 0 in x.shape:
        raise ValueError(f"{name}: expected at least one row and one column, got {describe(x)}")
    if rows is not None and x.shape[0] != rows:
        raise ValueError(f"{name}: expected {rows} rows, got {describe(x)}")
    if columns is not None and x.shape[1] != columns:
        raise ValueError(f"{name}: expected {columns} columns, got {describe(x)}")


def check_index(name: str, x: Tensor, shape: tuple[int | None, ...], bound: int) -> None:
    """Raise ValueError unless `x` is an int64 tensor of `shape` (None: any size above 0) with entries 0 to bound - 1.

    Entries are checked on the CPU only, because reading them on a GPU would wait for the device. Fake tensors, used to
    estimate memory without computing, have no entries.
    """
    expected = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
    if not isinstance(x, Tensor) or x.dtype != torch.int64 or x.ndim != len(shape):
        raise ValueError(f"{name}: expected an int64 tensor of shape {expected}, got {describe(x)}")
    if 0 in x.shape or any(size not in (None, own) for size, own in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{name}: expected shape {expected}, got {describe(x)}")
    if x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling():
        low, high = (int(value) for value in x.aminmax())
        if low < 0 or high >= bound:
            raise ValueError(f"{name}: expected entries of 0 to {bound - 1}, got {low} to {high}")


def check_one_device(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    (first, leader), *others = tensors.items()
    for name, x in others:
        if x.device != leader.device:
            raise ValueError(f"{name}: expected the device of {first}, {leader.device}, got {x.device}")


def check_no_gradient(reason: str, **tensors: Tensor) -> None:
    """Raise ValueError if a tensor requires a gradient that would not be computed."""
    for name, x in tensors.items():
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a tensor that requires no gradient ({reason})")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")


def describe(x: object) -> str:
    """`x` as error messages show it: shape and dtype of a tensor, else its repr."""
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" if isinstance(x, Tensor) else repr(x)
