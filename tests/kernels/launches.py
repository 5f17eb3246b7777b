"""Launches to compile ahead of time: calls on meta tensors that launch each kernel as real shapes do."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sslkernels import contrast, ema_update, lars_update
from sslkernels.bank_nce import bank_nce_triton
from sslkernels.nt_xent import attraction_triton
from sslkernels.pixel_operations import BLUR, CONTRAST, NOTHING
from sslkernels.prototype_cross_entropy import _soften_triton
from sslkernels.sinkhorn import _assignments_triton, _column_levels_triton
from sslkernels.soft_cross_entropy import _backward_triton, _forward_triton
from sslkernels.views import Table, write_views


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# "operation: arguments of this launch" -> the call
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


def _lars_update(momentum: float, found_inf: Tensor | None) -> None:
    tensors = [_meta(2048, 2048), _meta(2048)]
    lars_update._square_sums_triton(tensors, tensors)
    scales = _meta(len(tensors), dtype=torch.float64)
    lars_update._update_triton(tensors, tensors, tensors, scales, momentum, 1e-6, found_inf)


LAUNCHES |= {
    "lars_update: momentum": lambda: _lars_update(0.9, None),
    "lars_update: momentum, found_inf": lambda: _lars_update(0.9, _meta()),
    "lars_update: no momentum": lambda: _lars_update(0.0, None),
}


def _info_nce(dtype: torch.dtype, dim: int, temperature: float) -> None:
    queries = _meta(1024, dim, dtype=dtype)
    contrast._contrast_triton(queries, queries, _meta(65536, dim, dtype=dtype), None, temperature, True)


def _batch_nce(dtype: torch.dtype, dim: int, temperature: float) -> None:
    rows, own = _meta(4096, dim, dtype=dtype), _meta(4096, 1, dtype=torch.int64)
    contrast._contrast_triton(rows, rows, rows, own, temperature, True)


def _nt_xent(dtype: torch.dtype, dim: int, temperature: float) -> None:
    rows, pair, log_sum = _meta(8192, dim, dtype=dtype), _meta(8192, 2, dtype=torch.int64), _meta(8192)
    contrast.sweep_triton(rows, rows, pair, temperature, needs_keys=False, is_unit=True)
    attraction_triton(rows, rows, pair, log_sum, log_sum, temperature)


def _bank_nce(dtype: torch.dtype, dim: int, temperature: float) -> None:
    rows, drawn = _meta(256, dim, dtype=dtype), _meta(256, 65536, dtype=torch.int64)
    bank_nce_triton(rows, _meta(1281167, dim), rows, drawn, temperature, True)


# float16 and small temperatures use the running maximum, the others the fixed shift.
LAUNCHES |= {
    f"{name}: {str(dtype).removeprefix('torch.')}, D {dim}, T {temperature}": partial(call, dtype, dim, temperature)
    for name, call in {"info_nce": _info_nce, "batch_nce": _batch_nce, "nt_xent": _nt_xent}.items()
    for dtype, dim, temperature in [
        (torch.bfloat16, 128, 0.2),
        (torch.bfloat16, 128, 0.01),
        (torch.bfloat16, 256, 0.2),
        (torch.bfloat16, 256, 0.01),
        (torch.float16, 256, 0.2),
        (torch.float32, 128, 0.2),
        (torch.float32, 128, 0.01),
    ]
}
LAUNCHES |= {
    "bank_nce: bfloat16 against float32, D 128": partial(_bank_nce, torch.bfloat16, 128, 0.07),
    "bank_nce: float32, D 1024": partial(_bank_nce, torch.float32, 1024, 0.07),
}


def _sinkhorn(dtype: torch.dtype, rows: int, columns: int) -> None:
    scores = _meta(rows, columns, dtype=dtype)
    _column_levels_triton(scores, None, 0.05)
    _column_levels_triton(scores, _meta(rows), 0.05)
    _assignments_triton(scores, _meta(columns), 0.05)


def _soft_cross_entropy(dtype: torch.dtype, rows: int, columns: int) -> None:
    scores = _meta(rows, columns, dtype=dtype)
    for tau_t, center in [(0.04, _meta(columns)), (0.04, None), (None, None)]:
        losses, statistics = _forward_triton(scores, scores, center, 0.1, tau_t)
        _backward_triton(losses, scores, scores, center, statistics, 0.1, tau_t)


LAUNCHES |= {
    f"{name}: {str(dtype).removeprefix('torch.')}, {rows} x {columns}": partial(call, dtype, rows, columns)
    for name, call in {"sinkhorn": _sinkhorn, "soft_cross_entropy": _soft_cross_entropy}.items()
    for dtype, rows, columns in [
        (torch.bfloat16, 4000, 65536),
        (torch.float32, 4000, 65536),
        (torch.float32, 256, 3000),
    ]
}


LAUNCHES["prototype_cross_entropy: 1024 x 65536"] = lambda: _soften_triton(_meta(1024, 65536), _meta(1024), 0.1)


def _views(dtype: torch.dtype, height: int, width: int) -> None:
    """Two images with a contrast and a blur each, which reaches 8 pixels, of a recipe with 6 operations."""
    codes = torch.full((2, 6), NOTHING, dtype=torch.int32)
    codes[:, 1], codes[:, 5] = CONTRAST, BLUR
    table = Table(codes, torch.ones(2, 6), torch.ones(2) > 0, torch.ones(2, 2, 9), torch.ones(2, 3))
    crops = _meta(2, height, width, 3, dtype=torch.uint8)
    write_views(torch.empty_like(crops, dtype=dtype).permute(0, 3, 1, 2), [crops], table)


LAUNCHES |= {
    f"views: {str(dtype).removeprefix('torch.')}, {height} x {width}": partial(_views, dtype, height, width)
    for dtype, height, width in [
        (torch.bfloat16, 224, 224),
        (torch.float32, 224, 224),
        (torch.bfloat16, 96, 96),
        (torch.bfloat16, 33, 47),
    ]
}
