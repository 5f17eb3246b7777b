"""Cross-entropy over prototypes against a teacher's softmax, without the N x K scores of the student (DINO: Caron et
al. 2021, arXiv 2104.14294, eq. 1 to 3; K is 65,536 there, and a row meets one or two targets).

    loss = sum_i sum_j a_ij CE(q_r(ij), softmax(x_i W^T / tau_s)),   q_r = softmax((t_r - center) / tau_t)

The loss is linear in the student's scores but for their log-sum. With m_r = sum_k q_rk w_k, M_i = sum_j a_ij m_r(ij),
c_i = sum_j a_ij, p_i = softmax(x_i W^T / tau_s) and y_r = sum_(ij: r(ij) = r) a_ij x_i,

    loss = sum_i (c_i lse_i - x_i . M_i / tau_s)
    d loss / d x_i = (c_i sum_k p_ik w_k - M_i) / tau_s
    d loss / d W   = (sum_i c_i p_i^T x_i - sum_r q_r^T y_r) / tau_s

so which row meets which target never enters a pass over the prototypes. Rows go in chunks: a product gives the scores
of a chunk, one pass turns them in place into c_i p_i, and two products give both gradients, in the forward pass
already. That is 6 N K D operations for the student and 4 R K D for R targets, with no scores computed twice, and no
more memory than a chunk, both gradients and the teacher's scores, which the caller has.

Where row i meets target i alone (masked patches: iBOT, Zhou et al. 2022, arXiv 2111.07832, eq. 2), nothing is saved by
that. There the difference a_i (p_i - q_i) of a chunk goes into both products: 6 N K D operations in all, not 10 N K D.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.arguments import (
    check_index,
    check_matrix,
    check_no_gradient,
    check_one_device,
    check_positive,
    describe,
)
from sslkernels.device import launch, outside_autocast, runs_triton
from sslkernels.gradient import with_gradient
from sslkernels.running_softmax import LOWEST, exponentiate_, weigh, weigh_all
from sslkernels.soft_cross_entropy import _forward, _gradient

ROWS_ON_GPU = 1024  # of a chunk: enough for a product at full rate
ROWS_ON_CPU, CHUNK_ON_CPU = 64, 2**20  # least rows of a chunk, and its numbers per thread


@outside_autocast
def prototype_cross_entropy(
    rows: Tensor,
    prototypes: Tensor,
    teacher: Tensor,
    pairs: Tensor | None,
    shares: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    center: Tensor | None = None,
) -> Tensor:
    """Weighted sum of cross-entropies between a teacher's softmax over prototypes and that of a student's rows.

    Products are in float32 (TF32 where torch allows it), or float64 for float64 rows. The gradient is made in the
    forward pass and has no derivative.

    Args:
        rows: (N, D), what the student's scores are computed from; they get a gradient.
        prototypes: (K, D), for the scores rows @ prototypes.T; they get a gradient.
        teacher: (R, K) scores. No gradient.
        pairs: (N, J) int64, the rows of the teacher that each row of the student is compared with. None: row i with row
            i of the teacher, which has N rows then.
        shares: (N, J), weight of each pair, 0 for none; (N, 1) without pairs. No gradient.
        student_temperature: tau_s, above 0.
        teacher_temperature: tau_t, above 0.
        center: (K,), subtracted from the teacher's scores. No gradient.

    Returns:
        0-d, float32 (float64 for float64 rows). For the mean over rows the shares of all rows add up to 1.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device.
    """
    check_matrix("rows", rows)
    check_matrix("prototypes", prototypes, columns=rows.shape[1])
    check_matrix("teacher", teacher, columns=len(prototypes))
    check_matrix("shares", shares, rows=len(rows), columns=None if pairs is not None else 1)
    given = {"teacher": teacher, "shares": shares} | ({} if center is None else {"center": center})
    if pairs is None:
        check_matrix("teacher", teacher, rows=len(rows))
    else:
        check_index("pairs", pairs, tuple(shares.shape), len(teacher))
        given["pairs"] = pairs
    if center is not None and (not center.is_floating_point() or center.shape != (len(prototypes),)):
        raise ValueError(f"center: expected a floating tensor of shape ({len(prototypes)},), got {describe(center)}")
    check_one_device(rows=rows, prototypes=prototypes, **given)
    check_no_gradient("only rows and prototypes get one", **given)
    check_positive("student_temperature", student_temperature)
    check_positive("teacher_temperature", teacher_temperature)
    to_rows, to_prototypes = (torch.is_grad_enabled() and x.requires_grad for x in (rows, prototypes))
    loss, row_gradients, prototype_gradients = _loss_and_gradients(
        rows.detach(), prototypes.detach(), teacher, pairs, shares, center,
        student_temperature, teacher_temperature, to_rows, to_prototypes,
    )  # fmt: skip
    result = with_gradient(loss, rows, row_gradients) if to_rows else loss
    if to_prototypes:
        result = result + with_gradient(torch.zeros_like(loss), prototypes, prototype_gradients)
    return result


def reference(
    rows: Tensor,
    prototypes: Tensor,
    teacher: Tensor,
    pairs: Tensor | None,
    shares: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    center: Tensor | None = None,
) -> Tensor:
    """`prototype_cross_entropy` in plain PyTorch, with all N x K scores."""
    q = torch.softmax((teacher if center is None else teacher - center) / teacher_temperature, dim=1)
    log_p = torch.log_softmax(rows @ prototypes.T / student_temperature, dim=1)
    if pairs is None:
        return -(shares * q * log_p).sum()
    return -sum((shares[:, j, None] * q[pairs[:, j]] * log_p).sum() for j in range(pairs.shape[1]))  # type: ignore[return-value]


@torch.library.custom_op("sslkernels::prototype_cross_entropy", mutates_args=())
def _loss_and_gradients(
    rows: Tensor,
    prototypes: Tensor,
    teacher: Tensor,
    pairs: Tensor | None,
    shares: Tensor,
    center: Tensor | None,
    tau_s: float,
    tau_t: float,
    to_rows: bool,
    to_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients with respect to rows and prototypes, where they are wanted."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    x, w, shares = rows.to(dtype), prototypes.to(dtype), shares.to(dtype)
    if pairs is None:
        return _row_by_row(x, w, teacher, shares.squeeze(1), center, tau_s, tau_t, to_rows, to_prototypes)
    mass = shares.sum(dim=1)
    means = x.new_empty((len(teacher), x.shape[1]))
    row_gradients, prototype_gradients = x.new_empty((len(x) * to_rows, x.shape[1])), w.new_empty((0, w.shape[1]))
    met = torch.zeros_like(means)  # y_r
    if to_prototypes:
        prototype_gradients = torch.zeros_like(w)
        met.index_add_(0, pairs.flatten(), (shares.unsqueeze(2) * x.unsqueeze(1)).flatten(0, 1))
    for part in _chunks(teacher):
        q = teacher[part].to(dtype, copy=True)
        if center is not None:
            q.sub_(center.to(dtype))
        _soften_(q, torch.ones_like(q[:, 0]), tau_t)
        torch.mm(q, w, out=means[part])
        if to_prototypes:
            prototype_gradients.addmm_(q.T, met[part], alpha=-1)
    targets = (shares.unsqueeze(2) * means[pairs]).sum(dim=1)  # M
    loss = -(x * targets).sum() / tau_s
    for part in _chunks(x, len(w)):
        scores = x[part] @ w.T
        loss = loss + (mass[part] * _soften_(scores, mass[part], tau_s)).sum()
        if to_rows:
            torch.mm(scores, w, out=row_gradients[part])
        if to_prototypes:
            prototype_gradients.addmm_(scores.T, x[part])
    if to_rows:
        row_gradients.sub_(targets).div_(tau_s)
    return loss, row_gradients, prototype_gradients.div_(tau_s)


@_loss_and_gradients.register_fake
def _(
    rows: Tensor,
    prototypes: Tensor,
    teacher: Tensor,
    pairs: Tensor | None,
    shares: Tensor,
    center: Tensor | None,
    tau_s: float,
    tau_t: float,
    to_rows: bool,
    to_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = rows.new_empty((), dtype=torch.promote_types(rows.dtype, torch.float32))
    row_gradients = loss.new_empty((len(rows) * to_rows, rows.shape[1]))
    return loss, row_gradients, loss.new_empty((len(prototypes) * to_prototypes, rows.shape[1]))


def _row_by_row(
    x: Tensor,
    w: Tensor,
    teacher: Tensor,
    shares: Tensor,
    center: Tensor | None,
    tau_s: float,
    tau_t: float,
    to_rows: bool,
    to_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_loss_and_gradients`, for rows that meet the target of the same number; shares (N,)."""
    loss = x.new_zeros(())
    row_gradients = x.new_empty((len(x) * to_rows, x.shape[1]))
    prototype_gradients = w.new_zeros((len(w) * to_prototypes, w.shape[1]))
    for part in _chunks(x, len(w)):
        scores, target = x[part] @ w.T, teacher[part].to(x.dtype)
        losses, statistics = _forward(scores, target, center, tau_s, tau_t)
        loss = loss + (losses * shares[part]).sum()
        if to_rows or to_prototypes:
            difference = _gradient(shares[part], scores, target, center, statistics, tau_s, tau_t)
        if to_rows:
            torch.mm(difference, w, out=row_gradients[part])
        if to_prototypes:
            prototype_gradients.addmm_(difference.T, x[part])
    return loss, row_gradients, prototype_gradients


def _chunks(x: Tensor, columns: int | None = None) -> Iterator[slice]:
    """Slices over the rows of `x` whose scores, of as many columns, are held at once."""
    wide = columns or x.shape[1]
    step = ROWS_ON_GPU if x.is_cuda else max(ROWS_ON_CPU, CHUNK_ON_CPU * torch.get_num_threads() // wide)
    return (slice(start, start + step) for start in range(0, len(x), step))


def _soften_(scores: Tensor, factors: Tensor, temperature: float) -> Tensor:
    """Turns scores (B, K) into factors (B,) times softmax(scores / temperature), in place.

    Returns:
        (B,), log sum_k exp(scores_bk / temperature).
    """
    if not runs_triton(scores):
        high = scores.amax(dim=1, keepdim=True)
        total = exponentiate_(scores.sub_(high), temperature).sum(dim=1, keepdim=True)
        scores.mul_(factors.unsqueeze(1) / total)
        return (high / temperature + total.log()).squeeze(1)
    return _soften_triton(scores, factors, temperature)


def _soften_triton(scores: Tensor, factors: Tensor, temperature: float) -> Tensor:
    log_sums = torch.empty_like(factors)
    launch(
        _soften, (len(scores),),
        scores, factors, log_sums, scores.shape[1], scores.stride(0), math.log2(math.e) / temperature,
        COLUMNS=2048, num_warps=8,
    )  # fmt: skip
    return log_sums


@triton.jit
def _soften(scores, factors, log_sums, columns, stride, scale, COLUMNS: tl.constexpr):
    """Program b: row b, read twice and written once; the second time it comes from the cache for the most part."""
    row = tl.program_id(0).to(tl.int64)
    place = scores + row * stride
    high = tl.full([COLUMNS], LOWEST, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(place + column, mask=column < columns, other=-float("inf"))
        high, old, new = weigh(high, x, scale)
        total = total * old + new
    top, weight = weigh_all(high, scale, 0)
    sum_of_all = tl.sum(total * weight, axis=0)
    tl.store(log_sums + row, top * scale * 0.6931471805599453 + tl.log(sum_of_all))
    factor = tl.load(factors + row) / sum_of_all
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(place + column, mask=column < columns, other=-float("inf"))
        tl.store(place + column, tl.exp2((x - top) * scale) * factor, mask=column < columns)
