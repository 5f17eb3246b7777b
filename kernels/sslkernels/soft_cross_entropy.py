"""Cross-entropy of a student's softmax against a teacher's (DINO: Caron et al. 2021, arXiv 2104.14294, eq. 1-3 with the
center of section 3.1; SwAV: Caron et al. 2020, arXiv 2006.09882, eq. 2, with the center of `sinkhorn_center`).

    loss_b = -sum_k q_bk log softmax(student_b / tau_s)_k,   q_b = softmax((teacher_b - center) / tau_t)
           = log sum_k exp(student_bk / tau_s) - sum_k q_bk student_bk / tau_s
    d loss_b / d student_bk = (softmax(student_b / tau_s)_k - q_bk) / tau_s

One pass over student and teacher computes both sums of exponentials and the sum of the cross terms; the backward pass
computes the exponentials again. The gradient, in the dtype of the student, is the only B x K tensor; four numbers per
row are kept for the backward pass. Memory traffic per score of s bytes: 2 s forward, 3 s backward (the center, 4 K
bytes, is mostly cached). On the CPU a chunk needs several passes through the cache, and `torch.compile` of `reference`
takes 0.6 to 0.9 of the time (docs/kernels.md).
"""

import math
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.arguments import check_matrix, check_no_gradient, check_one_device, check_positive, describe
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


def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    student_temperature: float,
    teacher_temperature: float | None,
    center: Tensor | None = None,
    *,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Cross-entropy between the softmax of a teacher's and of a student's scores, each with its own temperature.

    A teacher's score of -inf is probability 0 and adds nothing to the loss, even where the student's score is -inf. A
    row whose teacher is -inf throughout has no target: its loss and gradient are 0.

    Args:
        student: (B, K) scores; they get the gradient.
        teacher: (B, K) scores, or probabilities. No gradient.
        student_temperature: tau_s, above 0.
        teacher_temperature: tau_t, above 0; None if the rows of `teacher` are probabilities. These need not sum to 1:
            the loss is the sum over k in any case.
        center: (K,), subtracted from the teacher's scores: DINO's running mean, or the result of `sinkhorn_center` with
            its epsilon as tau_t. No gradient.
        reduction: "mean" over the rows, or "none".

    Returns:
        The loss, 0-d or (B,), float32 (float64 if student or teacher is).

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.
    """
    check_matrix("student", student)
    check_matrix("teacher", teacher, rows=len(student), columns=student.shape[1])
    check_positive("student_temperature", student_temperature)
    if teacher_temperature is not None:
        check_positive("teacher_temperature", teacher_temperature)
    if center is not None:
        if teacher_temperature is None:
            raise ValueError("center: expected None, since the teacher's rows are probabilities")
        if not isinstance(center, Tensor) or center.shape != student.shape[1:] or not center.is_floating_point():
            raise ValueError(
                f"center: expected a floating tensor of {student.shape[1]} entries, got {describe(center)}"
            )
        check_one_device(student=student, center=center)
        check_no_gradient("only the student gets one", center=center)
    check_one_device(student=student, teacher=teacher)
    check_no_gradient("only the student gets one", teacher=teacher)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
    losses, _ = _forward(student, teacher, center, student_temperature, teacher_temperature)
    return losses.mean() if reduction == "mean" else losses


def reference(
    student: Tensor,
    teacher: Tensor,
    student_temperature: float,
    teacher_temperature: float | None,
    center: Tensor | None = None,
    *,
    reduction: str = "mean",
) -> Tensor:
    """`soft_cross_entropy` in plain PyTorch."""
    if teacher_temperature is not None:
        scores = teacher if center is None else teacher - center
        teacher = torch.softmax(scores / teacher_temperature, dim=1).masked_fill(scores == -math.inf, 0.0)
    terms = teacher * torch.log_softmax(student / student_temperature, dim=1)
    losses = -terms.masked_fill(teacher == 0, 0.0).sum(dim=1)
    return losses.mean() if reduction == "mean" else losses


@torch.library.custom_op("sslkernels::soft_cross_entropy", mutates_args=())
def _forward(
    student: Tensor, teacher: Tensor, center: Tensor | None, tau_s: float, tau_t: float | None
) -> tuple[Tensor, Tensor]:
    """Losses (B,), and the statistics of each row that the backward pass needs, (4, B): see `_finish`."""
    forward = _forward_triton if _takes_triton(student, teacher, center) else _forward_in_chunks
    return forward(student, teacher, center, tau_s, tau_t)


@_forward.register_fake
def _(
    student: Tensor, teacher: Tensor, center: Tensor | None, tau_s: float, tau_t: float | None
) -> tuple[Tensor, Tensor]:
    losses = student.new_empty(len(student), dtype=_sum_dtype(student, teacher))
    return losses, losses.new_empty((4, len(student)))


@torch.library.custom_op("sslkernels::soft_cross_entropy_gradient", mutates_args=())
def _gradient(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    statistics: Tensor,
    tau_s: float,
    tau_t: float | None,
) -> Tensor:
    """(B, K) gradient with respect to the student, in its dtype. A second derivative is an error, not zero."""
    backward = _backward_triton if _takes_triton(student, teacher, center) else _backward_in_chunks
    return backward(upstream, student, teacher, center, statistics, tau_s, tau_t)


@_gradient.register_fake
def _(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    statistics: Tensor,
    tau_s: float,
    tau_t: float | None,
) -> Tensor:
    return student.new_empty(student.shape)


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    student, teacher, center, *ctx.temperatures = inputs
    ctx.save_for_backward(student, teacher, center, output[1])


def _backward(ctx, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    return _gradient(upstream, *ctx.saved_tensors, *ctx.temperatures), None, None, None, None


_forward.register_autograd(_backward, setup_context=_remember)


def _takes_triton(student: Tensor, teacher: Tensor, center: Tensor | None) -> bool:
    return runs_triton(student, teacher) and (center is None or runs_triton(center))


def _sum_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# In chunks


def _forward_in_chunks(
    student: Tensor, teacher: Tensor, center: Tensor | None, tau_s: float, tau_t: float | None
) -> tuple[Tensor, Tensor]:
    sums = student.new_empty((5, len(student)), dtype=_sum_dtype(student, teacher))
    for rows in row_chunks(student):
        s, t = student[rows].to(sums.dtype), _centered(teacher[rows], center, sums.dtype)
        high_s, high_t = finite_max(s, dim=1), finite_max(t, dim=1)
        s = s - high_s
        e = t if tau_t is None else exponentiate_(t - high_t, tau_t)
        cross = (e * s).sum(dim=1)
        if s.is_cuda or not cross.isfinite().all():  # s may be -inf where e is 0; on a GPU always, to avoid a wait
            cross = (e * s).masked_fill_(e == 0, 0.0).sum(dim=1)
        sums[0, rows], sums[1, rows] = high_s.squeeze(1), exponentiate_(s, tau_s).sum(dim=1)
        sums[2, rows], sums[3, rows], sums[4, rows] = high_t.squeeze(1), e.sum(dim=1), cross
    return _finish(sums, tau_s, tau_t)


def _finish(sums: Tensor, tau_s: float, tau_t: float | None) -> tuple[Tensor, Tensor]:
    """Losses (B,), and for the backward pass (4, B): high_s, factor_s, high_t, factor_t.

    Args:
        sums: (5, B): high_s, total_s, high_t, total_t, cross, where for each row
            total_s = sum_k exp((student_k - high_s) / tau_s),   e_k = exp((teacher_k - center_k - high_t) / tau_t)
            (or the teacher's probability),   total_t = sum_k e_k,   cross = sum_k e_k (student_k - high_s).

    The gradient is (exp((student_k - high_s) / tau_s) factor_s - e_k factor_t) / tau_s.
    """
    high_s, total_s, high_t, total_t, cross = sums.unbind()
    is_empty, one = total_t == 0, torch.ones_like(total_t)
    mass, norm = (total_t, one) if tau_t is None else (one, total_t)
    losses = mass * total_s.log() - cross / norm / tau_s
    factor_s, factor_t = (mass / total_s).masked_fill_(is_empty, 0.0), (1 / norm).masked_fill_(is_empty, 0.0)
    return losses.masked_fill_(is_empty, 0.0), torch.stack([high_s, factor_s, high_t, factor_t])


def _backward_in_chunks(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    statistics: Tensor,
    tau_s: float,
    tau_t: float | None,
) -> Tensor:
    gradient = student.new_empty(student.shape)
    for rows in row_chunks(student):
        high_s, factor_s, high_t, factor_t = statistics[:, rows].unsqueeze(2)
        scale = upstream[rows].unsqueeze(1) / tau_s
        p = exponentiate_(student[rows] - high_s, tau_s).mul_(factor_s)
        t = _centered(teacher[rows], center, p.dtype)
        e = t if tau_t is None else exponentiate_(t - high_t, tau_t)
        torch.mul(p.addcmul_(e, factor_t, value=-1), scale, out=gradient[rows])
    return gradient


def _centered(teacher: Tensor, center: Tensor | None, dtype: torch.dtype) -> Tensor:
    return teacher.to(dtype) if center is None else teacher - center.to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Triton


def _forward_triton(
    student: Tensor, teacher: Tensor, center: Tensor | None, tau_s: float, tau_t: float | None
) -> tuple[Tensor, Tensor]:
    student, teacher, center = contiguous_rows(student), contiguous_rows(teacher), _contiguous(center)
    (rows, columns), block_rows, block_columns = student.shape, 4, 256  # one warp per row
    row_blocks = triton.cdiv(rows, block_rows)
    splits, per_split = split(columns, block_columns, 4, row_blocks, student.device)
    parts = student.new_empty((splits, 5, rows), dtype=torch.float32)
    losses, statistics = parts.new_empty(rows), parts.new_empty((4, rows))
    launch(
        _sweep, (row_blocks, splits),
        student, teacher, center, parts, rows, columns, per_split, student.stride(0), teacher.stride(0),
        *_scales(tau_s, tau_t), ARE_PROBABILITIES=tau_t is None, ROWS=block_rows, COLUMNS=block_columns, num_warps=4,
    )  # fmt: skip
    launch(
        _merge, (triton.cdiv(rows, 32),),
        parts, losses, statistics, rows, splits, *_scales(tau_s, tau_t),
        ARE_PROBABILITIES=tau_t is None, ROWS=32, SPLITS=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip
    return losses, statistics


def _backward_triton(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    statistics: Tensor,
    tau_s: float,
    tau_t: float | None,
) -> Tensor:
    student, teacher, center = contiguous_rows(student), contiguous_rows(teacher), _contiguous(center)
    (rows, columns), block_rows, block_columns = student.shape, 4, 512
    gradient = student.new_empty((rows, columns), dtype=torch.float32 if INTERPRETED else student.dtype)
    launch(
        _differentiate, (triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns)),
        upstream.contiguous(), student, teacher, center, statistics, gradient,
        rows, columns, student.stride(0), teacher.stride(0),
        *_scales(tau_s, tau_t), ARE_PROBABILITIES=tau_t is None, ROWS=block_rows, COLUMNS=block_columns, num_warps=4,
    )  # fmt: skip
    return gradient.to(student.dtype)


def _contiguous(center: Tensor | None) -> Tensor | None:
    return None if center is None else center.contiguous()


def _scales(tau_s: float, tau_t: float | None) -> tuple[float, float]:
    """log2(e) / temperature of student and teacher."""
    return math.log2(math.e) / tau_s, math.log2(math.e) / (1.0 if tau_t is None else tau_t)


@triton.jit
def _sweep(
    student, teacher, center, parts, rows, columns, per_split, student_stride, teacher_stride, scale_s, scale_t,
    ARE_PROBABILITIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (b, s): block b of rows, split s of the columns.

    Each position of the tile has its own sums until the end, so threads exchange nothing within the loop.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    high_s = tl.full([ROWS, COLUMNS], LOWEST, tl.float32)
    high_t = tl.full([ROWS, COLUMNS], LOWEST, tl.float32)
    total_s = tl.zeros([ROWS, COLUMNS], tl.float32)
    total_t = tl.zeros([ROWS, COLUMNS], tl.float32)
    cross = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = tl.program_id(1) * per_split
    for start in range(first, tl.minimum(first + per_split, columns), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        s = load_tile(student, row, column, rows, columns, student_stride, -float("inf"))
        t = _load_teacher(teacher, center, row, column, rows, columns, teacher_stride, ARE_PROBABILITIES)
        higher_s, old, new = weigh(high_s, s, scale_s)
        total_s = total_s * old + new
        cross += (high_s - higher_s) * total_t
        high_s = higher_s
        s -= high_s  # may be -inf, and then cross may be too
        if ARE_PROBABILITIES:
            total_t += t
            cross += tl.where(t == 0, 0.0, t * s)
        else:
            high_t, old, new = weigh(high_t, t, scale_t)
            total_t = total_t * old + new
            cross = tl.where(old > 0, cross * old, 0.0) + tl.where(new > 0, new * s, 0.0)
    valid = row < rows
    out = parts + tl.program_id(1).to(tl.int64) * 5 * rows + row
    top, weight = weigh_all(high_s, scale_s, 1)
    cross += (high_s - top[:, None]) * total_t
    tl.store(out, top, mask=valid)
    tl.store(out + rows, tl.sum(total_s * weight, axis=1), mask=valid)
    top, weight = weigh_all(high_t, scale_t, 1)
    tl.store(out + 2 * rows, top, mask=valid)
    tl.store(out + 3 * rows, tl.sum(total_t * weight, axis=1), mask=valid)
    tl.store(out + 4 * rows, tl.sum(tl.where(weight > 0, cross * weight, 0.0), axis=1), mask=valid)


@triton.jit
def _merge(
    parts, losses, statistics, rows, splits, scale_s, scale_t,
    ARE_PROBABILITIES: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program b merges all splits of block b of the rows. The formulas are those of `_finish`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS)
    valid = (split < splits)[:, None] & (row < rows)[None, :]
    part = parts + split[:, None] * 5 * rows + row[None, :]
    high = tl.load(part, mask=valid, other=LOWEST)
    high_s, weight = weigh_all(high, scale_s, 0)
    total_s = tl.sum(tl.load(part + rows, mask=valid, other=0.0) * weight, axis=0)
    total = tl.load(part + 3 * rows, mask=valid, other=0.0)
    cross = tl.load(part + 4 * rows, mask=valid, other=0.0) + (high - high_s[None, :]) * total
    high_t, weight = weigh_all(tl.load(part + 2 * rows, mask=valid, other=LOWEST), scale_t, 0)
    total_t = tl.sum(total * weight, axis=0)
    cross = tl.sum(tl.where(weight > 0, cross * weight, 0.0), axis=0)

    is_empty = total_t == 0
    mass, norm = tl.full([ROWS], 1.0, tl.float32), total_t
    if ARE_PROBABILITIES:
        mass, norm = total_t, mass
    loss = mass * tl.log(total_s) - cross / norm * (scale_s * 0.6931471805599453)
    out, valid = statistics + row, row < rows
    tl.store(losses + row, tl.where(is_empty, 0.0, loss), mask=valid)
    tl.store(out, high_s, mask=valid)
    tl.store(out + rows, tl.where(is_empty, 0.0, mass / total_s), mask=valid)
    tl.store(out + 2 * rows, high_t, mask=valid)
    tl.store(out + 3 * rows, tl.where(is_empty, 0.0, 1.0 / norm), mask=valid)


@triton.jit
def _differentiate(
    upstream, student, teacher, center, statistics, gradient,
    rows, columns, student_stride, teacher_stride, scale_s, scale_t,
    ARE_PROBABILITIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid, place = row < rows, statistics + row
    scale = tl.load(upstream + row, mask=valid, other=0.0) * (scale_s * 0.6931471805599453)
    high_s = tl.load(place, mask=valid, other=0.0)
    factor_s = tl.load(place + rows, mask=valid, other=0.0)
    high_t = tl.load(place + 2 * rows, mask=valid, other=0.0)
    factor_t = tl.load(place + 3 * rows, mask=valid, other=0.0)
    s = load_tile(student, row, column, rows, columns, student_stride, -float("inf"))
    e = _load_teacher(teacher, center, row, column, rows, columns, teacher_stride, ARE_PROBABILITIES)
    if not ARE_PROBABILITIES:
        e = tl.exp2((e - high_t[:, None]) * scale_t)
    p = tl.exp2((s - high_s[:, None]) * scale_s)
    difference = p * factor_s[:, None] - e * factor_t[:, None]
    store_tile(gradient, row, column, rows, columns, difference * scale[:, None])


@triton.jit
def _load_teacher(teacher, center, row, column, rows, columns, stride, ARE_PROBABILITIES: tl.constexpr):
    """A float32 tile of scores minus the center, or of probabilities."""
    if ARE_PROBABILITIES:
        return load_tile(teacher, row, column, rows, columns, stride, 0.0)
    t = load_tile(teacher, row, column, rows, columns, stride, -float("inf"))
    if center is not None:
        t -= load_tile(center, row, column, rows, columns, 0, 0.0)
    return t
