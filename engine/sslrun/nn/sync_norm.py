"""Batch normalization of one group over all ranks: `SyncBN`, with one collective in each direction.

Forward, every rank sends its mean, its variance and its number of rows, and merges what all have sent; backward, the
two sums over rows that the gradient of the input needs (Ioffe & Szegedy 2015, arXiv 1502.03167, section 3). Ranks may
have different numbers of rows, at least one each.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.runtime.distributed import all_gather_rows, all_reduce_sum_, rank_sum, ranks_stacked


def normalize_over_ranks(
    x: Tensor, one_pass: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x normalized, and the statistics of the pass.

    Args:
        x: (rows, C, ...), rows of this rank.
        one_pass: (3, at least C): zeros, and a last row of ones; see `GroupBatchNorm`.
        weight: scale (C,), or None.
        bias: shift (C,), or None.
        eps: number added to the variance.
    """
    # A compiler fuses the formula; otherwise torch's kernels move far less memory than it.
    is_wide = torch.promote_types(x.dtype, torch.float32) == one_pass.dtype
    is_native = x.is_cuda and is_wide and not torch.compiler.is_compiling()
    return (_ByKernels if is_native else _ByFormula).apply(x, one_pass, weight, bias, eps)


def as_one_pass(mean: Tensor, unbiased_var: Tensor, one_pass: Tensor) -> Tensor:
    """Mean and variance, (C,) each, in the form of `one_pass`."""
    padding = one_pass.shape[1] - len(mean)
    return torch.cat([F.pad(torch.stack([mean, unbiased_var]), (0, padding)), one_pass[2:]])


class _ByFormula(torch.autograd.Function):
    """By functional collectives, which a compiled graph may contain."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, one_pass: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, _axes(x), correction=0)
        channels, count = len(mean), mean.new_full((1,), x.numel() / len(mean))
        means, variances, counts = ranks_stacked(torch.cat([mean, var, count])).split([channels, channels, 1], 1)
        # Deviations from the mean, not squares, so nothing cancels.
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        var = ((variances + (means - mean).square()) * counts).sum(0) / count
        scale = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.has_bias = bias is not None
        slope = scale if weight is None else scale * weight
        y = (wide - _per_channel(mean, x)) * _per_channel(slope, x)
        if bias is not None:
            y = y + _per_channel(bias, x)
        statistics = as_one_pass(mean, var * (count / (count - 1)), one_pass)
        ctx.mark_non_differentiable(statistics)
        return y.to(x.dtype), statistics

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        dy = gradients[0].to(mean.dtype)
        unit = (x.to(mean.dtype) - _per_channel(mean, x)) * _per_channel(scale, x)
        d_bias, d_weight = dy.sum(_axes(x)), (dy * unit).sum(_axes(x))
        mean_dy, mean_dy_unit = (rank_sum(torch.stack([d_bias, d_weight])) / count).unbind()
        dx = dy - _per_channel(mean_dy, x) - unit * _per_channel(mean_dy_unit, x)
        dx = dx * _per_channel(scale if weight is None else scale * weight, x)
        return dx.to(x.dtype), None, None if weight is None else d_weight, d_bias if ctx.has_bias else None, None


class _ByKernels(torch.autograd.Function):
    """By the CUDA kernels of `torch.nn.SyncBatchNorm`, which read their input in its own dtype.

    Forward reads x twice and writes y; backward reads x and dy twice and writes dx. torch's layer itself also takes the
    ranks without rows out of the counts, for which the host waits.
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


def _axes(x: Tensor) -> list[int]:
    """All axes but that of the channels."""
    return [axis for axis in range(x.dim()) if axis != 1]


def _per_channel(x: Tensor, like: Tensor) -> Tensor:
    return x.view([1, -1] + [1] * (like.dim() - 2))
