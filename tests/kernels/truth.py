"""Bounds on errors: a result may be twice as far from float64 as plain PyTorch in the same dtype."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sslkernels.device import INTERPRETED

NIGHTLY_IF_INTERPRETED = [pytest.mark.nightly] if INTERPRETED else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def error(result: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinite if one value is finite and the other is not."""
    difference = (result.double().cpu() - truth.double().cpu()).abs()
    return float(difference.nan_to_num(nan=torch.inf).max()) if difference.numel() else 0.0


def assert_as_accurate(result: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """`result` is at most twice as far from `truth` as `plain`, plus one unit in the last place of `dtype`.

    Args:
        result: result of the operation for inputs of `dtype`.
        plain: result of the PyTorch reference for the same inputs in the same dtype.
        truth: result of the reference for the same inputs in float64.
    """
    assert result.shape == truth.shape, f"shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    unit = torch.finfo(dtype).eps * float(truth.abs().max()) if truth.numel() else 0.0
    bound = 2 * error(plain, truth) + unit
    assert error(result, truth) <= bound, f"error {error(result, truth):.3g} above {bound:.3g} (unit {unit:.3g})"


def value_and_gradient(function: Callable[..., Tensor], x: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    """(`function(x, *others)`, 0-d or (B,); gradient of its sum with respect to `x`)."""
    x = x.detach().clone().requires_grad_()
    value = function(x, *others)
    value.sum().backward()
    return value.detach(), x.grad
