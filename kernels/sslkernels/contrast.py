"""Similarities of query rows to key rows in one pass over the keys; shared by the contrastive losses.

For queries q_i (normalized here), keys k_j (normalized by the caller) and similarities s_ij = q_i.k_j, one pass gives

    total_i = sum_j exp(s_ij / T - shift_i),   best_i = max_j s_ij,   key_sum_i = sum_j exp(s_ij / T - shift_i) k_j

These three give InfoNCE, its gradient with respect to the queries, and whether the positive is the closest. This is
flash attention (Dao et al. 2022, arXiv 2205.14135) with the keys as values. No B x K tensor exists, and the forward
pass already computes the gradient. 4 B K D operations; the keys are read once for each block of queries.

Rows are normalized, so no logit is above 1/T. While exp(-2/T) is a normal float32, `shift = 1/T` makes a running
maximum unnecessary. Below T = 0.025, and in float16 with its short exponent, the shift is the largest similarity so
far, divided by T.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.device import INTERPRETED, architecture, launch, operand_dtype, processors, runs_triton

LARGE = 1e30  # similarities below minus this mark keys that do not count
EPSILON = 1e-12  # rows of at most this length count as zero and get no gradient
CHUNK_ELEMENTS = 2**19  # of a B x chunk tile on the CPU: 2 MiB, which fits a core's cache


def contrast(
    queries: Tensor, positives: Tensor, keys: Tensor, skipped: Tensor | None, temperature: float, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """loss_i = -log(e(q_i.p_i) / (e(q_i.p_i) + sum_j e(q_i.k_j))), with e(s) = exp(s / temperature).

    Args:
        queries: (B, D), not yet normalized.
        positives: (B, D), normalized.
        keys: (K, D), normalized.
        skipped: (B, 1) or (B, 2) int64, row i holds the keys that query i ignores; or None.
        temperature: T.
        needs_gradient: whether to compute the gradient.

    Returns:
        losses (B,); gradients (B, D), row i of loss i with respect to row i of `queries`, or empty; hits (B,), 1 where
        the positive is closer than every key, else 0. All float32 (float64 for float64 queries).
    """
    if is_for_kernels(queries, keys):
        return _contrast_triton(queries, positives, keys, skipped, temperature, needs_gradient)
    unit, length = normalize(queries)
    positives = positives.to(unit.dtype)
    passed = sweep_in_chunks(unit, keys, skipped, temperature, needs_gradient)
    return finish(unit, length, positives, *passed, temperature)


def is_for_kernels(queries: Tensor, keys: Tensor) -> bool:
    """Whether the kernels support these tensors. Others take the chunked path, on a GPU too.

    Rows must fit a tile. float32 is supported if TF32 products are allowed (torch.set_float32_matmul_precision).
    """
    if not runs_triton(queries, keys):
        return False
    if product_dtype(queries, keys) != torch.float32:
        return queries.shape[1] <= 256
    return queries.shape[1] <= 128 and (INTERPRETED or torch.get_float32_matmul_precision() != "highest")


def normalize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(B, D) -> unit rows (B, D) and lengths (B, 1), float32 or float64."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / length.clamp_min(EPSILON), length


def through_normalization(gradient: Tensor, unit: Tensor, length: Tensor) -> Tensor:
    """Gradient with respect to rows, given that with respect to their unit rows; 0 for zero rows."""
    tangent = gradient.addcmul_(unit, (gradient * unit).sum(dim=1, keepdim=True), value=-1)
    return tangent.div_(length.clamp_min(EPSILON)).masked_fill_(length <= EPSILON, 0.0)


def log_sums(unit: Tensor, keys: Tensor, skipped: Tensor | None, temperature: float) -> Tensor:
    """(B,): log sum_j exp(u_i.k_j / T) for unit rows u (B, D). The other arguments are those of `contrast`."""
    if not is_for_kernels(unit, keys):
        log_total, shift, _, _ = sweep_in_chunks(unit, keys, skipped, temperature, needs_keys=False, needs_best=False)
        return log_total + shift / temperature
    totals, bests, _ = sweep_triton(unit, keys, skipped, temperature, needs_keys=False, is_unit=True)
    if is_shift_fixed(temperature, product_dtype(unit, keys)):
        return totals.sum(dim=0).log() + 1 / temperature
    return torch.logsumexp(totals.log() + bests / temperature, dim=0)


def is_shift_fixed(temperature: float, dtype: torch.dtype) -> bool:
    """Whether the shift is 1/T, so that no running maximum is needed."""
    return temperature >= 0.025 and dtype != torch.float16


def sweep_in_chunks(
    unit: Tensor,
    keys: Tensor,
    skipped: Tensor | None,
    temperature: float,
    needs_keys: bool,
    needs_best: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The pass in plain PyTorch, on one B x chunk tile that is reused.

    Returns:
        log_total (B,): log sum_j exp((s_ij - shift_i) / T); shift (B,); best (B,): max_j s_ij, undefined unless
            `needs_best`;
        mean_key (B, D): sum_j softmax_j(s_ij / T) k_j, or None unless `needs_keys`.
    """
    num_queries, num_keys = len(unit), len(keys)
    chunk = min(num_keys, max(64, CHUNK_ELEMENTS // num_queries))
    scratch = unit.new_empty(num_queries * chunk)
    is_fixed = is_shift_fixed(temperature, unit.dtype)
    best = unit.new_full((num_queries, 1), -LARGE)
    total, shift = torch.zeros_like(best), torch.ones_like(best)
    key_sum = torch.zeros_like(unit) if needs_keys else None
    for start in range(0, num_keys, chunk):
        part = keys[start : start + chunk].to(unit.dtype)
        tile = scratch[: num_queries * len(part)].view(num_queries, len(part))
        torch.mm(unit, part.T, out=tile)
        if skipped is not None:
            fill_columns_(tile, skipped - start, -2 * LARGE)
        previous = best
        if needs_best or not is_fixed:
            best = torch.maximum(best, tile.amax(dim=1, keepdim=True))
        if not is_fixed:
            rescale = ((previous - best) / temperature).exp_()
            total.mul_(rescale)
            if key_sum is not None:
                key_sum.mul_(rescale)
            shift = best
        tile.sub_(shift).mul_(1 / temperature).exp_()
        total.add_(tile.sum(dim=1, keepdim=True))
        if key_sum is not None:
            key_sum.addmm_(tile, part)
    mean_key = None if key_sum is None else key_sum.div_(total.clamp_min(torch.finfo(unit.dtype).tiny))
    return total.log().squeeze(1), shift.squeeze(1), best.squeeze(1), mean_key


def fill_columns_(tile: Tensor, columns: Tensor, value: float) -> None:
    """Set tile[i, columns[i]] for all columns that are inside the tile."""
    for column in columns.split(1, dim=1):
        place = column.clamp(0, tile.shape[1] - 1)
        tile.scatter_(1, place, tile.gather(1, place).masked_fill_(column == place, value))


def finish(
    unit: Tensor,
    length: Tensor,
    positives: Tensor,
    log_total: Tensor,
    shift: Tensor,
    best: Tensor,
    mean_key: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, gradients and hits, as `contrast` returns them, from one pass over the negatives."""
    similarity = (unit * positives).sum(dim=1)
    margin = log_total + (shift - similarity) / temperature
    losses, hits = F.softplus(margin, threshold=50), (similarity > best).to(unit.dtype)
    if mean_key is None:
        return losses, unit.new_empty(0), hits
    # The negatives together have probability sigmoid(margin), and the positive lacks as much.
    gradient = (mean_key - positives).mul_(margin.sigmoid().unsqueeze(1) / temperature)
    return losses, through_normalization(gradient, unit, length), hits


# ---------------------------------------------------------------------------------------------------------------------
# Triton


def tiles(dim: int, dtype: torch.dtype, device: torch.device, needs_keys: bool) -> dict[str, int]:
    """Block sizes, stages and warps of a pass over keys: the largest without register spills."""
    block_dim = max(16, triton.next_power_of_2(dim))
    is_hopper, is_wide = architecture(device) >= 90, block_dim > 128
    if dtype == torch.float32:
        rows, keys, stages, warps = (64, 32, 2, 8) if is_hopper else (16, 32, 2, 4)
    elif not is_hopper:
        rows, keys, stages, warps = (32, 32, 2, 8) if is_wide else (128, 32, 3, 8)
    elif needs_keys:
        rows, keys, stages, warps = (64, 64, 2, 8) if is_wide else (128, 64, 3, 8)
    else:
        rows, keys, stages, warps = (128, 64, 2, 8) if is_wide else (128, 128, 3, 8)
    return {"BLOCK_B": rows, "BLOCK_K": keys, "BLOCK_D": block_dim, "num_stages": stages, "num_warps": warps}


def split_keys(num_queries: int, num_keys: int, block: dict[str, int], device: torch.device) -> tuple[int, int]:
    """(splits, keys per split): as many splits as give each processor one program."""
    row_blocks = triton.cdiv(num_queries, block["BLOCK_B"])
    key_blocks = triton.cdiv(num_keys, block["BLOCK_K"])
    blocks_per_split = triton.cdiv(key_blocks, max(1, min(key_blocks, processors(device) // row_blocks)))
    return triton.cdiv(key_blocks, blocks_per_split), blocks_per_split * block["BLOCK_K"]


def contiguous_rows(x: Tensor) -> Tensor:
    """`x` with contiguous rows, as the kernels require."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def product_dtype(queries: Tensor, keys: Tensor) -> torch.dtype:
    """The dtype of the products: that of the queries, or of the keys if the queries are float32."""
    return queries.dtype if queries.dtype != torch.float32 else keys.dtype


def sweep_triton(
    queries: Tensor,
    keys: Tensor,
    skipped: Tensor | None,
    temperature: float,
    needs_keys: bool,
    is_unit: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The pass by the kernel, over splits of the keys that remain to be merged. `is_unit`: queries are unit rows.

    Returns:
        totals (splits, B), bests (splits, B), key_sums (splits, B, D) or empty; all float32.
    """
    dtype = product_dtype(queries, keys)
    queries, keys = contiguous_rows(queries), contiguous_rows(keys.to(dtype))
    (num_queries, dim), num_keys = queries.shape, len(keys)
    block = tiles(dim, dtype, queries.device, needs_keys)
    splits, keys_per_split = split_keys(num_queries, num_keys, block, queries.device)
    totals = queries.new_empty((splits, num_queries), dtype=torch.float32)
    bests = torch.empty_like(totals)
    key_sums = totals.new_empty((splits, num_queries, dim) if needs_keys else (0,))
    launch(
        _sweep, (triton.cdiv(num_queries, block["BLOCK_B"]), splits),
        queries, keys, skipped, totals, bests, key_sums,
        num_queries, num_keys, keys_per_split, math.log2(math.e) / temperature, queries.stride(0), keys.stride(0),
        D=dim, OPERAND=operand_dtype(dtype), FIXED_SHIFT=is_shift_fixed(temperature, dtype),
        SKIP=0 if skipped is None else skipped.shape[1], SUM_KEYS=needs_keys, NORMALIZE=not is_unit, EPSILON=EPSILON,
        **block,
    )  # fmt: skip
    return totals, bests, key_sums


def _contrast_triton(
    queries: Tensor, positives: Tensor, keys: Tensor, skipped: Tensor | None, temperature: float, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    partials = sweep_triton(queries, keys, skipped, temperature, needs_gradient)
    dtype = product_dtype(queries, keys)
    return merge_triton(queries, positives, *partials, temperature, is_shift_fixed(temperature, dtype))


def merge_triton(
    queries: Tensor,
    positives: Tensor,
    totals: Tensor,
    bests: Tensor,
    key_sums: Tensor,
    temperature: float,
    is_fixed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, gradients and hits, as `contrast` returns them, from the splits of a pass over the negatives."""
    queries, positives = contiguous_rows(queries), contiguous_rows(positives)
    num_queries, dim = queries.shape
    splits, needs_gradient = len(totals), key_sums.numel() > 0
    losses, hits = torch.empty_like(totals[0]), torch.empty_like(totals[0])
    gradients = totals.new_empty((num_queries, dim) if needs_gradient else (0,))
    launch(
        _merge, (num_queries,),
        queries, positives, totals, bests, key_sums, losses, gradients, hits,
        num_queries, splits, math.log2(math.e) / temperature, queries.stride(0), positives.stride(0),
        D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_S=triton.next_power_of_2(splits),
        EPSILON=EPSILON, FIXED_SHIFT=is_fixed, HAS_GRADIENT=needs_gradient, num_warps=4,
    )  # fmt: skip
    return losses, gradients, hits


@triton.jit
def load_rows(start, row, valid, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A (rows, BLOCK_D) tile of a matrix in its own dtype; zeros outside."""
    dims = tl.arange(0, BLOCK_D)
    place = start + row.to(tl.int64)[:, None] * stride + dims[None, :]
    if D == BLOCK_D:
        return tl.load(place, mask=valid[:, None], other=0.0)
    return tl.load(place, mask=valid[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def _tile(
    unit, keys, start, num_keys, key_stride, skip, skip_too, total, best, key_sum, scale,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr, OPERAND: tl.constexpr,
    FIXED_SHIFT: tl.constexpr, SKIP: tl.constexpr, SUM_KEYS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    column = start + tl.arange(0, BLOCK_K)
    key = load_rows(keys, column, column < num_keys, key_stride, D, BLOCK_D).to(OPERAND)
    similarity = tl.dot(unit, tl.trans(key))
    if SKIP:
        similarity = tl.where(column[None, :] == skip[:, None], -1e30, similarity)
    if SKIP == 2:
        similarity = tl.where(column[None, :] == skip_too[:, None], -1e30, similarity)
    if TAIL:
        similarity = tl.where((column < num_keys)[None, :], similarity, -1e30)
    new_best = tl.maximum(best, tl.max(similarity, axis=1))
    if FIXED_SHIFT:
        weight = tl.exp2(similarity * scale - scale)
    else:
        weight = tl.exp2((similarity - new_best[:, None]) * scale)
        if SKIP or TAIL:  # if all keys so far are skipped, the shift is -1e30
            weight = tl.where(similarity > -1e29, weight, 0.0)
        rescale = tl.exp2((best - new_best) * scale)
        total *= rescale
        key_sum *= rescale[:, None]
    total += tl.sum(weight, axis=1)
    if SUM_KEYS:
        key_sum = tl.dot(weight.to(OPERAND), key, key_sum)
    return total, new_best, key_sum


@triton.jit
def _sweep(
    queries, keys, skipped, totals, bests, key_sums,
    num_queries, num_keys, keys_per_split, scale, query_stride, key_stride,
    D: tl.constexpr, OPERAND: tl.constexpr, FIXED_SHIFT: tl.constexpr, SKIP: tl.constexpr,
    SUM_KEYS: tl.constexpr, NORMALIZE: tl.constexpr, EPSILON: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (b, s): block b of the queries against split s of the keys. `scale` is log2(e) / T."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    valid = row < num_queries
    unit = load_rows(queries, row, valid, query_stride, D, BLOCK_D)
    if NORMALIZE:
        unit = unit.to(tl.float32)
        unit = unit / tl.maximum(tl.sqrt(tl.sum(unit * unit, axis=1)), EPSILON)[:, None]
    unit = unit.to(OPERAND)
    skip, skip_too = row, row
    if SKIP:
        skip = tl.load(skipped + row * SKIP, mask=valid, other=-1)
        skip_too = tl.load(skipped + row * SKIP + (SKIP - 1), mask=valid, other=-1)
    total = tl.zeros([BLOCK_B], tl.float32)
    best = tl.full([BLOCK_B], -1e30, tl.float32)
    key_sum = tl.zeros([BLOCK_B, BLOCK_D] if SUM_KEYS else [BLOCK_B, 1], tl.float32)
    first = tl.program_id(1) * keys_per_split
    last = tl.minimum(first + keys_per_split, num_keys)
    whole = first + (last - first) // BLOCK_K * BLOCK_K
    for start in range(first, whole, BLOCK_K):
        total, best, key_sum = _tile(
            unit, keys, start, num_keys, key_stride, skip, skip_too, total, best, key_sum, scale,
            BLOCK_K, BLOCK_D, D, OPERAND, FIXED_SHIFT, SKIP, SUM_KEYS, False,
        )  # fmt: skip
    if whole < last:
        total, best, key_sum = _tile(
            unit, keys, whole, num_keys, key_stride, skip, skip_too, total, best, key_sum, scale,
            BLOCK_K, BLOCK_D, D, OPERAND, FIXED_SHIFT, SKIP, SUM_KEYS, True,
        )  # fmt: skip
    out = tl.program_id(1).to(tl.int64) * num_queries + row
    tl.store(totals + out, total, mask=valid)
    tl.store(bests + out, best, mask=valid)
    if SUM_KEYS:
        dims = tl.arange(0, BLOCK_D)
        tl.store(key_sums + out[:, None] * D + dims[None, :], key_sum, mask=valid[:, None] & (dims < D)[None, :])


@triton.jit
def _merge(
    queries, positives, totals, bests, key_sums, losses, gradients, hits,
    num_queries, splits, scale, query_stride, positive_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, EPSILON: tl.constexpr, FIXED_SHIFT: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Program i merges the splits of row i, in their order. The formulas are those of `finish`."""
    row = tl.program_id(0).to(tl.int64)
    split, dims = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    parts = split * num_queries + row
    split_best = tl.load(bests + parts, mask=split < splits, other=-1e30)
    weight = tl.load(totals + parts, mask=split < splits, other=0.0)
    best = tl.max(split_best, axis=0)
    shift = scale
    if not FIXED_SHIFT:
        shift = best * scale
        weight *= tl.exp2((split_best - best) * scale)
    total = tl.sum(weight, axis=0)

    query = tl.load(queries + row * query_stride + dims, mask=dims < D, other=0.0).to(tl.float32)
    positive = tl.load(positives + row * positive_stride + dims, mask=dims < D, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(query * query, axis=0))
    unit = query / tl.maximum(length, EPSILON)
    similarity = tl.sum(unit * positive, axis=0)
    margin = (tl.log2(total) + shift - similarity * scale) * 0.6931471805599453
    decay = tl.exp(-tl.abs(margin))
    tl.store(losses + row, tl.maximum(margin, 0.0) + tl.log(1.0 + decay))
    tl.store(hits + row, (similarity > best).to(tl.float32))
    if HAS_GRADIENT:
        key_sum = tl.zeros([BLOCK_D], tl.float32)
        part = row
        for _ in range(splits):
            partial = tl.load(key_sums + part * D + dims, mask=dims < D, other=0.0)
            if not FIXED_SHIFT:
                partial *= tl.exp2((tl.load(bests + part) - best) * scale)
            key_sum += partial
            part += num_queries
        negatives_share = tl.where(margin > 0, 1.0, decay) / (1.0 + decay)
        mean_key = tl.where(total > 0, key_sum / total, 0.0)
        gradient = (mean_key - positive) * (negatives_share * scale * 0.6931471805599453)
        gradient = (gradient - unit * tl.sum(gradient * unit, axis=0)) / tl.maximum(length, EPSILON)
        gradient = tl.where(length > EPSILON, gradient, 0.0)
        tl.store(gradients + row * D + dims, gradient, mask=dims < D)
