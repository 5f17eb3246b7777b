"""InfoNCE with negatives drawn from a memory bank for each query (NPID: Wu et al. 2018, arXiv 1805.01978, in the form
of eq. 1 of arXiv 1911.05722, as later implementations write it).

    loss_i = -log( exp(q_i.b_pos(i) / T) / (exp(q_i.b_pos(i) / T) + sum_j exp(q_i.b_neg(i,j) / T)) )

One pass gathers and multiplies the rows of the bank tile by tile. No B x K x D and no B x K tensor exists, and each
negative is read once (B K D numbers) for loss and gradient together.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.arguments import check_index, check_matrix, check_no_gradient, check_one_device, check_positive
from sslkernels.contrast import (
    CHUNK_ELEMENTS,
    EPSILON,
    LARGE,
    contiguous_rows,
    finish,
    is_shift_fixed,
    merge_triton,
    normalize,
)
from sslkernels.device import launch, outside_autocast, processors, runs_triton
from sslkernels.gradient import with_gradient


@outside_autocast
def bank_nce(
    queries: Tensor, bank: Tensor, positive_index: Tensor, negative_index: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """InfoNCE loss of each query with its own row of the bank as positive and drawn rows as negatives.

    Everything is computed in float32. A zero query has similarity 0 to all rows and gets no gradient.

    Args:
        queries: (B, D), normalized inside; they get the gradient.
        bank: (N, D), normalized rows. No gradient.
        positive_index: (B,) int64, row of the bank that is the positive of each query.
        negative_index: (B, K) int64, rows of the bank that are its negatives; may repeat and may contain the positive.
        temperature: T, above 0.

    Returns:
        The mean loss, and the share of queries that are closer to their positive than to every negative; both 0-d,
        float32 (float64 for float64 queries).

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; on the CPU, an index outside the bank.
    """
    check_matrix("queries", queries)
    check_matrix("bank", bank, columns=queries.shape[1])
    check_one_device(queries=queries, bank=bank, positive_index=positive_index, negative_index=negative_index)
    check_index("positive_index", positive_index, (len(queries),), len(bank))
    check_index("negative_index", negative_index, (len(queries), None), len(bank))
    check_no_gradient("only queries get one", bank=bank)
    check_positive("temperature", temperature)
    needs_gradient = torch.is_grad_enabled() and queries.requires_grad
    losses, gradients, hits = _bank_nce(
        queries.detach(), bank, positive_index, negative_index, temperature, needs_gradient
    )
    if needs_gradient:
        losses = with_gradient(losses, queries, gradients)
    return losses.mean(), hits.mean()


def reference(
    queries: Tensor, bank: Tensor, positive_index: Tensor, negative_index: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """`bank_nce` in plain PyTorch, with all B x K x D gathered rows."""
    rows = bank[torch.cat([positive_index.unsqueeze(1), negative_index], dim=1)]
    logits = torch.bmm(rows, F.normalize(queries, dim=1).unsqueeze(2)).squeeze(2)
    hits = logits[:, 0] > logits[:, 1:].amax(dim=1)
    loss = F.cross_entropy(logits / temperature, torch.zeros_like(positive_index))
    return loss, hits.to(loss.dtype).mean()


@torch.library.custom_op("sslkernels::bank_nce", mutates_args=())
def _bank_nce(
    queries: Tensor,
    bank: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    temperature: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    positives = bank[positive_index]
    if runs_triton(queries, bank) and queries.shape[1] <= 1024:
        return bank_nce_triton(queries, bank, positives, negative_index, temperature, needs_gradient)
    unit, length = normalize(queries)
    passed = _gather_in_chunks(unit, bank, negative_index, temperature, needs_gradient)
    return finish(unit, length, positives.to(unit.dtype), *passed, temperature)


@_bank_nce.register_fake
def _(
    queries: Tensor,
    bank: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    temperature: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    losses = queries.new_empty(len(queries), dtype=torch.promote_types(queries.dtype, torch.float32))
    return losses, losses.new_empty(queries.shape if needs_gradient else (0,)), torch.empty_like(losses)


def _gather_in_chunks(
    unit: Tensor, bank: Tensor, negative_index: Tensor, temperature: float, needs_keys: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """log_total, shift, best and mean_key, as `sslkernels.contrast.sweep_in_chunks` returns them.

    One query at a time: its rows are gathered into the cache once, for the similarities and for the sum of keys.
    """
    chunk = min(negative_index.shape[1], max(1, CHUNK_ELEMENTS // unit.shape[1]))
    rows = bank.new_empty((chunk, unit.shape[1]))
    best, total, key_sum = unit.new_full((len(unit), 1), -LARGE), unit.new_zeros((len(unit), 1)), torch.zeros_like(unit)
    for i, index in enumerate(negative_index.unbind()):
        for part in index.split(chunk):
            keys = torch.index_select(bank, 0, part, out=rows[: len(part)]).to(unit.dtype)
            similarity = torch.mv(keys, unit[i])
            previous, best[i] = best[i].clone(), torch.maximum(best[i], similarity.max())
            weight = similarity.sub_(best[i]).div_(temperature).exp_()
            rescale = ((previous - best[i]) / temperature).exp_()
            total[i] = total[i] * rescale + weight.sum()
            if needs_keys:
                key_sum[i].mul_(rescale).addmv_(keys.T, weight)
    mean_key = key_sum / total if needs_keys else None
    return total.log().squeeze(1), best.squeeze(1), best.squeeze(1), mean_key


def bank_nce_triton(
    queries: Tensor, bank: Tensor, positives: Tensor, negative_index: Tensor, temperature: float, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (B,), gradients (B, D) or empty, and hits (B,), computed by the kernels."""
    queries, bank, negative_index = contiguous_rows(queries), contiguous_rows(bank), contiguous_rows(negative_index)
    (num_queries, dim), num_negatives = queries.shape, negative_index.shape[1]
    block_dim = triton.next_power_of_2(dim)
    block = max(1, min(64, 8192 // block_dim))
    splits = max(1, min(triton.cdiv(num_negatives, block), 8 * processors(queries.device) // num_queries))
    per_split = triton.cdiv(triton.cdiv(num_negatives, splits), block) * block
    splits = triton.cdiv(num_negatives, per_split)
    totals = queries.new_empty((splits, num_queries), dtype=torch.float32)
    bests = torch.empty_like(totals)
    key_sums = totals.new_empty((splits, num_queries, dim) if needs_gradient else (0,))
    is_fixed = is_shift_fixed(temperature, torch.float32)
    launch(
        _gather, (num_queries, splits),
        queries, bank, negative_index, totals, bests, key_sums,
        num_queries, num_negatives, per_split, math.log2(math.e) / temperature,
        queries.stride(0), bank.stride(0), negative_index.stride(0),
        D=dim, FIXED_SHIFT=is_fixed, SUM_KEYS=needs_gradient, EPSILON=EPSILON, BLOCK_K=block, BLOCK_D=block_dim,
        num_warps=4,
    )  # fmt: skip
    return merge_triton(queries, positives, totals, bests, key_sums, temperature, is_fixed)


@triton.jit
def _gather(
    queries, bank, negative_index, totals, bests, key_sums,
    num_queries, num_negatives, per_split, scale, query_stride, bank_stride, index_stride,
    D: tl.constexpr, FIXED_SHIFT: tl.constexpr, SUM_KEYS: tl.constexpr, EPSILON: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, s): query i and split s of its negatives. `scale` is log2(e) / T."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    query = tl.load(queries + row * query_stride + dims, mask=dims < D, other=0.0).to(tl.float32)
    unit = query / tl.maximum(tl.sqrt(tl.sum(query * query, axis=0)), EPSILON)
    best = tl.max(tl.full([BLOCK_K], -1e30, tl.float32), axis=0)
    total = tl.sum(tl.zeros([BLOCK_K], tl.float32), axis=0)
    key_sum = tl.zeros([BLOCK_D], tl.float32)
    first = tl.program_id(1) * per_split
    for start in range(first, tl.minimum(first + per_split, num_negatives), BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < num_negatives
        index = tl.load(negative_index + row * index_stride + column, mask=inside, other=0)
        place = bank + index[:, None] * bank_stride + dims[None, :]
        key = tl.load(place, mask=inside[:, None] & (dims < D)[None, :], other=0.0).to(tl.float32)
        similarity = tl.where(inside, tl.sum(key * unit[None, :], axis=1), -1e30)
        new_best = tl.maximum(best, tl.max(similarity, axis=0))
        if FIXED_SHIFT:
            weight = tl.exp2(similarity * scale - scale)
        else:
            weight = tl.exp2((similarity - new_best) * scale)
            rescale = tl.exp2((best - new_best) * scale)
            total *= rescale
            key_sum *= rescale
        total += tl.sum(weight, axis=0)
        if SUM_KEYS:
            key_sum += tl.sum(key * weight[:, None], axis=0)
        best = new_best
    out = tl.program_id(1).to(tl.int64) * num_queries + row
    tl.store(totals + out, total)
    tl.store(bests + out, best)
    if SUM_KEYS:
        tl.store(key_sums + out * D + dims, key_sum, mask=dims < D)
