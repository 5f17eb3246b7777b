"""Sinkhorn-Knopp assignments of rows to prototypes (SwAV: Caron et al. 2020, arXiv 2006.09882, eq. 3-5 and listing).

In the log domain, with x = scores / epsilon, B rows on all ranks and beta = 0:

    repeat num_iters times:   alpha_k = -log sum_b exp(x_bk + beta_b)    (all columns get the same mass)
                              beta_b  = -log sum_k exp(x_bk + alpha_k)   (all rows get the same mass)
    q_bk = exp(x_bk + alpha_k + beta_b)

SwAV's code computes the same by dividing exp(x) by its column and row sums; its factors 1/K and 1/B cancel. Since the
rows are normalized last, q_b = softmax((scores_b - center) / epsilon) with center = -epsilon alpha. A Sinkhorn target
is thus a softmax with a center, which `soft_cross_entropy` accepts, so the B x K assignments need not exist.

On a GPU the first iteration reads the scores once and each further one twice; the assignments take two reads and one
write. On the CPU a chunk of rows is normalized and added to the columns while it is in the cache, so each iteration and
the assignments read the scores once; `torch.compile` of `reference` takes 0.8 to 1.1 of the time there
(docs/kernels.md).
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.arguments import check_matrix, check_positive
from sslkernels.collective import gather_rows
from sslkernels.contrast import contiguous_rows
from sslkernels.device import INTERPRETED, launch, runs_triton
from sslkernels.running_softmax import (
    LOWEST,
    exponentiate_,
    finite_max,
    load_tile,
    row_chunks,
    split,
    store_tile,
    weigh,
    weigh_all,
)


def sinkhorn(scores: Tensor, epsilon: float, num_iters: int, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Assignments of rows to prototypes that use all prototypes equally.

    A score of -inf is an impossible assignment. A row or column that is -inf throughout gets assignments of 0 and does
    not affect the others.

    Args:
        scores: (B, K), this rank's rows.
        epsilon: temperature, above 0; a lower one gives sharper assignments.
        num_iters: number of iterations, at least 1.
        group: process group over which columns are summed; None: this process alone. Ranks may have different numbers
            of rows, at least one. One all-gather of K floats per iteration; all ranks get bit-equal column sums.

    Returns:
        (B, K) in the dtype of the scores, without gradient; rows sum to 1.

    Raises:
        ValueError: an argument of the wrong shape, dtype or range.
    """
    center = sinkhorn_center(scores, epsilon, num_iters, group=group)
    return _assignments(scores.detach(), center, epsilon)


@torch.no_grad()
def sinkhorn_center(
    scores: Tensor | list[Callable[[], Tensor]],
    epsilon: float,
    num_iters: int,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The center with which softmax((scores - center) / epsilon) equals the assignments of `sinkhorn`.

    Args:
        scores: (B, K), this rank's rows; or functions that give parts of them, at least one row each, which each
            iteration calls, so that one part exists at a time.
        epsilon: as for `sinkhorn`, like the others and the errors.
        num_iters: number of iterations.
        group: process group over which columns are summed.

    Returns:
        (K,) float32 (float64 for float64 scores), the same on all ranks; 0 for a column without a finite score.
    """
    check_positive("epsilon", epsilon)
    if not isinstance(num_iters, int) or num_iters < 1:
        raise ValueError(f"num_iters: expected a whole number of at least 1, got {num_iters!r}")
    parts = scores if isinstance(scores, list) else [lambda: scores]
    center = _iterate(parts, None, epsilon, group)
    for _ in range(num_iters - 1):
        center = _iterate(parts, center, epsilon, group)
    return center


def _iterate(
    parts: list[Callable[[], Tensor]], center: Tensor | None, epsilon: float, group: dist.ProcessGroup | None
) -> Tensor:
    found = []
    for part in parts:
        scores = part()
        check_matrix("scores", scores)
        found.append(_column_levels(scores, center, epsilon))
        del scores  # before the next part exists
    levels = found[0] if len(found) == 1 else _column_levels(torch.stack(found), None, epsilon)
    if group is not None:
        levels = _column_levels(gather_rows(levels.unsqueeze(0), group), None, epsilon)
    return levels.nan_to_num(nan=math.nan, posinf=math.inf, neginf=0.0)


def reference(scores: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """The assignments in plain PyTorch, by the formulas above."""
    x = scores / epsilon
    beta = x.new_zeros(len(x), 1)
    for _ in range(num_iters):
        alpha = -_finite(torch.logsumexp(x + beta, dim=0, keepdim=True))
        beta = -_finite(torch.logsumexp(x + alpha, dim=1, keepdim=True))
    return torch.exp(x + alpha + beta)


def _finite(x: Tensor) -> Tensor:
    return x.masked_fill(x == -math.inf, 0.0)


@torch.library.custom_op("sslkernels::column_levels", mutates_args=())
def _column_levels(scores: Tensor, center: Tensor | None, epsilon: float) -> Tensor:
    """(K,): epsilon log sum_b exp((scores_bk - level_b) / epsilon), where level_b is the row level under the center,
    epsilon log sum_k exp((scores_bk - center_k) / epsilon), or 0 without a center."""
    if not runs_triton(scores):
        return _column_levels_in_chunks(scores, center, epsilon)
    row_levels = None if center is None else _row_levels_triton(scores, center, epsilon)
    return _column_levels_triton(scores, row_levels, epsilon)


@_column_levels.register_fake
def _(scores: Tensor, center: Tensor | None, epsilon: float) -> Tensor:
    return scores.new_empty(scores.shape[1], dtype=torch.promote_types(scores.dtype, torch.float32))


@torch.library.custom_op("sslkernels::sinkhorn_assignments", mutates_args=())
def _assignments(scores: Tensor, center: Tensor, epsilon: float) -> Tensor:
    """softmax((scores - center) / epsilon)."""
    return (_assignments_triton if runs_triton(scores) else _assignments_in_chunks)(scores, center, epsilon)


@_assignments.register_fake
def _(scores: Tensor, center: Tensor, epsilon: float) -> Tensor:
    return scores.new_empty(scores.shape)


# ---------------------------------------------------------------------------------------------------------------------
# In chunks


def _column_levels_in_chunks(scores: Tensor, center: Tensor | None, epsilon: float) -> Tensor:
    """Add up each column's mass under the old center; the result is the new center.

    Without a center, the maximum of each column takes its place, so that the largest term is 1. Under the center of an
    earlier iteration, each column has a mass of at least 1/K over all ranks once the rows are normalized (columns had
    mass 1 before, and no row more than K). Terms that underflow therefore do not matter, and no running maximum is
    needed.
    """
    is_first = center is None
    if center is None:
        center = finite_max(scores, dim=0).squeeze(0).to(torch.promote_types(scores.dtype, torch.float32))
    mass = torch.zeros_like(center)
    for rows in row_chunks(scores):
        x = scores[rows] - center
        if is_first:
            mass += exponentiate_(x, epsilon).sum(dim=0)
        else:
            mass.addmv_(x.T, _normalize_(x, epsilon))
    return center + mass.log_() * epsilon


def _assignments_in_chunks(scores: Tensor, center: Tensor, epsilon: float) -> Tensor:
    result = scores.new_empty(scores.shape)
    for rows in row_chunks(scores):
        x = scores[rows] - center
        factors = _normalize_(x, epsilon)
        torch.mul(x, factors.unsqueeze(1), out=result[rows])
    return result


def _normalize_(x: Tensor, epsilon: float) -> Tensor:
    """exp(x / epsilon) in place, up to a factor per row. Returns the factors that make each row sum to 1, or 0."""
    total = exponentiate_(x.sub_(finite_max(x, dim=1)), epsilon).sum(dim=1)
    return torch.where(total == 0, 0.0, 1 / total)


# ---------------------------------------------------------------------------------------------------------------------
# Triton


def _row_levels_triton(scores: Tensor, center: Tensor, epsilon: float) -> Tensor:
    """(B,): epsilon log sum_k exp((scores_bk - center_k) / epsilon)."""
    scores = contiguous_rows(scores)
    (rows, columns), block_rows, block_columns = scores.shape, 4, 512  # a warp for each row
    row_blocks = triton.cdiv(rows, block_rows)
    splits, per_split = split(columns, block_columns, 2, row_blocks, scores.device)
    parts = scores.new_empty((splits, rows), dtype=torch.float32)
    launch(
        _sweep_rows, (row_blocks, splits),
        scores, center, parts, rows, columns, per_split, scores.stride(0), math.log2(math.e) / epsilon,
        ROWS=block_rows, COLUMNS=block_columns, num_warps=4,
    )  # fmt: skip
    return parts[0] if splits == 1 else _column_levels_triton(parts, None, epsilon)


def _column_levels_triton(scores: Tensor, row_levels: Tensor | None, epsilon: float) -> Tensor:
    """epsilon log sum_b exp((scores_bk - row_levels_b) / epsilon), (K,)."""
    scores = contiguous_rows(scores)
    (rows, columns), block_rows, block_columns = scores.shape, 16, 256
    column_blocks = triton.cdiv(columns, block_columns)
    splits, per_split = split(rows, block_rows, 2, column_blocks, scores.device)
    parts = scores.new_empty((splits, columns), dtype=torch.float32)
    launch(
        _sweep_columns, (column_blocks, splits),
        scores, row_levels, parts, rows, columns, per_split, scores.stride(0), math.log2(math.e) / epsilon,
        ROWS=block_rows, COLUMNS=block_columns, num_warps=8,
    )  # fmt: skip
    return parts[0] if splits == 1 else _column_levels_triton(parts, None, epsilon)


def _assignments_triton(scores: Tensor, center: Tensor, epsilon: float) -> Tensor:
    row_levels = _row_levels_triton(scores, center, epsilon)
    scores = contiguous_rows(scores)
    (rows, columns), block_rows, block_columns = scores.shape, 4, 512
    result = scores.new_empty((rows, columns), dtype=torch.float32 if INTERPRETED else scores.dtype)
    launch(
        _assign, (triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns)),
        scores, center, row_levels, result, rows, columns, scores.stride(0), math.log2(math.e) / epsilon,
        ROWS=block_rows, COLUMNS=block_columns, num_warps=4,
    )  # fmt: skip
    return result.to(scores.dtype)


@triton.jit
def _sweep_rows(
    scores, center, parts, rows, columns, per_split, stride, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program (b, s): block b of rows, split s of the columns. `scale` is log2(e) / epsilon.

    Each position of the tile has its own sum until the end, so threads exchange nothing within the loop.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    high = tl.full([ROWS, COLUMNS], LOWEST, tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = tl.program_id(1) * per_split
    for start in range(first, tl.minimum(first + per_split, columns), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = load_tile(scores, row, column, rows, columns, stride, -float("inf"))
        x -= load_tile(center, row, column, rows, columns, 0, 0.0)
        high, old, new = weigh(high, x, scale)
        total = total * old + new
    top, weight = weigh_all(high, scale, 1)
    level = top + tl.log2(tl.sum(total * weight, axis=1)) / scale  # -inf for a row that is -inf throughout
    tl.store(parts + tl.program_id(1).to(tl.int64) * rows + row, level, mask=row < rows)


@triton.jit
def _sweep_columns(
    scores, row_levels, parts, rows, columns, per_split, stride, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program (k, s): block k of columns, split s of the rows."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    high = tl.full([ROWS, COLUMNS], LOWEST, tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, rows)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        x = load_tile(scores, row, column, last, columns, stride, -float("inf"))
        if row_levels is not None:
            x -= _finite_levels(row_levels, row, last)[:, None]
        high, old, new = weigh(high, x, scale)
        total = total * old + new
    top, weight = weigh_all(high, scale, 0)
    level = top + tl.log2(tl.sum(total * weight, axis=0)) / scale
    tl.store(parts + tl.program_id(1).to(tl.int64) * columns + column, level, mask=column < columns)


@triton.jit
def _assign(
    scores, center, row_levels, result, rows, columns, stride, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x = load_tile(scores, row, column, rows, columns, stride, -float("inf"))
    x -= load_tile(center, row, column, rows, columns, 0, 0.0)
    x -= _finite_levels(row_levels, row, rows)[:, None]
    store_tile(result, row, column, rows, columns, tl.exp2(x * scale))


@triton.jit
def _finite_levels(row_levels, row, rows):
    """Row levels, 0 in place of -inf, so that a row that is -inf throughout stays -inf."""
    level = tl.load(row_levels + row, mask=row < rows, other=0.0)
    return tl.where(level == -float("inf"), 0.0, level)
