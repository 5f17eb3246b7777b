"""The two forms of batch normalization in training that are not torch's own layer: a formula, and kernels over ranks.

Over ranks there is one collective in each direction. Forward, every rank sends its mean, its variance and its number of
rows, and merges what all have sent; backward, the two sums over rows that the gradient of the input needs (Ioffe &
Szegedy 2015, arXiv 1502.03167, section 3). Ranks may have different numbers of rows, at least one each.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.runtime.distributed import all_gather_rows, all_reduce_sum_, rank_sum, ranks_stacked

Shape = tuple[int, int, int]  # of the rows of a batch: views V, groups G, samples n of a group


def by_formula(
    x: Tensor,
    shape: Shape,
    one_pass: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    over_ranks: bool = False,
) -> tuple[Tensor, Tensor]:
    """x normalized group by group, and the statistics of the pass; a compiler fuses each direction into two passes.

    Args:
        x: (V x G x n, C, ...), view-major.
        shape: (V, G, n).
        one_pass: (3, at least C): zeros, and a last row of ones; see `GroupBatchNorm`.
        weight: scale (C,), or None.
        bias: shift (C,), or None.
        eps: number added to the variance.
        over_ranks: whether the one group is that of all ranks.
    """
    return _ByFormula.apply(x, shape, one_pass, weight, bias, eps, over_ranks)


def over_ranks_by_kernels(
    x: Tensor, one_pass: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """As `by_formula` over ranks, by the CUDA kernels of `torch.nn.SyncBatchNorm`; not for compiled graphs."""
    return _ByKernels.apply(x, one_pass, weight, bias, eps)


class _ByFormula(torch.autograd.Function):
    """The gradient is written out, since that of `torch.var_mean` computes the mean again. Collectives are functional,
    so that a compiled graph may contain them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: Shape,
        one_pass: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        over_ranks: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = x.unflatten(0, shape).to(torch.promote_types(x.dtype, torch.float32))  # (V, G, n, C, ...)
        var, mean = torch.var_mean(wide, _axes(wide), correction=0, keepdim=True)
        count = var.new_full((), wide.numel() // var.numel())
        if over_ranks:
            mean, var, count = _merged(mean, var, count)
        scale = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.shape, ctx.over_ranks, ctx.has_bias = shape, over_ranks, bias is not None
        y = (wide - mean) * (scale if weight is None else scale * _per_channel(weight, wide))
        if bias is not None:
            y = y + _per_channel(bias, wide)
        unbiased = var.mean(1).flatten() * (count / (count - 1))
        padding = (0, one_pass.shape[1] - x.shape[1])
        sums = F.pad(torch.stack([mean.mean(1).flatten(), unbiased]), padding)
        statistics = torch.cat([sums, one_pass[2:]])
        ctx.mark_non_differentiable(statistics)
        # Not a view, which an activation could not overwrite in place.
        return torch.ops.aten._unsafe_view(y.to(x.dtype), x.shape), statistics

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        dy, wide = (each.unflatten(0, ctx.shape).to(mean.dtype) for each in (gradients[0], x))
        unit = (wide - mean) * scale
        sums = torch.stack([dy.sum(_axes(wide), keepdim=True), (dy * unit).sum(_axes(wide), keepdim=True)])
        d_bias, d_weight = sums.sum(2).flatten(1)
        mean_dy, mean_dy_unit = ((rank_sum(sums) if ctx.over_ranks else sums) / count).unbind()
        dx = dy - mean_dy - unit * mean_dy_unit
        dx = dx * (scale if weight is None else scale * _per_channel(weight, wide))
        d_weight, d_bias = None if weight is None else d_weight, d_bias if ctx.has_bias else None
        return dx.to(x.dtype).flatten(0, 2), None, None, d_weight, d_bias, None, None


def _merged(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and number of rows over all ranks. By deviations, not by squares, so nothing cancels."""
    means, variances, counts = ranks_stacked(torch.cat([mean.flatten(), var.flatten(), count.view(1)])).split(
        [mean.numel(), var.numel(), 1], 1
    )
    total = counts.sum()
    merged = (means * counts).sum(0) / total
    merged_var = ((variances + (means - merged).square()) * counts).sum(0) / total
    return merged.view_as(mean), merged_var.view_as(var), total


class _ByKernels(torch.autograd.Function):
    """The kernels read their input in its own dtype. Forward reads x twice and writes y; backward reads x and dy twice
    and writes dx. torch's layer itself also takes the ranks without rows out of the counts, for which the host waits.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, one_pass: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = _dense(x)
        mean, scale = torch.batch_norm_stats(x, eps)
        channels, count = len(mean), mean.new_full((1,), x.numel() / len(mean))
        gathered = all_gather_rows(torch.cat([mean, scale, count]).unsqueeze(0))
        means, scales, counts = gathered.split([channels, channels, 1], 1)
        statistics = one_pass.clone()  # with momentum 1 they become those of this pass
        running = statistics[0, :channels], statistics[1, :channels]
        mean, scale = torch.batch_norm_gather_stats_with_counts(
            x, means, scales, *running, momentum=1.0, eps=eps, counts=counts.flatten()
        )
        ctx.save_for_backward(x, weight, mean, scale, counts.to(torch.int32))
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(statistics)
        return torch.batch_norm_elemt(x, weight, bias, mean, scale, eps), statistics

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, counts = ctx.saved_tensors
        dy, has_weight = gradients[0], weight is not None
        if dy.stride() != x.stride():
            dy = torch.empty_like(x).copy_(dy)  # the fast kernels take both in one layout
        sum_dy, sum_dy_x, d_weight, d_bias = torch.batch_norm_backward_reduce(
            dy, x, mean, scale, weight, True, has_weight, ctx.has_bias
        )
        sum_dy, sum_dy_x = all_reduce_sum_(torch.stack([sum_dy, sum_dy_x])).unbind()
        dx = torch.batch_norm_backward_elemt(dy, x, mean, scale, weight, sum_dy, sum_dy_x, counts)
        return dx, None, d_weight if has_weight else None, d_bias if ctx.has_bias else None, None


def _dense(x: Tensor) -> Tensor:
    """x in a layout that the kernels know."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    is_last = x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])
    return x if is_last else x.contiguous()


def _axes(wide: Tensor) -> list[int]:
    """All axes of (V, G, n, C, ...) over which statistics are computed."""
    return [axis for axis in range(wide.dim()) if axis not in (1, 3)]


def _per_channel(x: Tensor, wide: Tensor) -> Tensor:
    return x.view([1, 1, 1, -1] + [1] * (wide.dim() - 4))
