"""Plays torch's CUDA kernels for SyncBatchNorm on the CPU, and counts what a normalization moves and sends.

`register` makes the operators known for every device that lacks them. Formulas as in torch's Normalization.cuh.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn.modules._functions import SyncBatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from sslrun.runtime import distributed


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(_wide(x), _axes(x), correction=0)
    return mean, torch.rsqrt(var + eps)


def _gather_stats(
    x: Tensor, means: Tensor, scales: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    momentum: float, eps: float, counts: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    weights, count = counts.unsqueeze(1), counts.sum()
    mean = (means * weights).sum(0) / count
    var = ((scales**-2 - eps + (means - mean) ** 2) * weights).sum(0) / count
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * count / (count - 1), momentum)
    return mean, torch.rsqrt(var + eps)


def _elemt(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor, eps: float) -> Tensor:
    y = (_wide(x) - _per_channel(mean, x)) * _per_channel(scale, x)
    y = y if weight is None else y * _per_channel(weight, x)
    return (y if bias is None else y + _per_channel(bias, x)).to(x.dtype)


def _backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, x_g: bool, weight_g: bool, bias_g: bool
) -> tuple[Tensor, ...]:
    sum_dy = _wide(dy).sum(_axes(x))
    sum_dy_x = (_wide(dy) * (_wide(x) - _per_channel(mean, x))).sum(_axes(x))
    nothing = sum_dy.new_empty(0)
    return sum_dy, sum_dy_x, sum_dy_x * scale if weight_g else nothing, sum_dy.clone() if bias_g else nothing


def _backward_elemt(
    dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, sum_dy: Tensor, sum_dy_x: Tensor,
    counts: Tensor,
) -> Tensor:  # fmt: skip
    assert counts.dtype == torch.int32
    dx = _wide(dy) - _per_channel(sum_dy / counts.sum(), x)
    dx -= (_wide(x) - _per_channel(mean, x)) * _per_channel(sum_dy_x / counts.sum() * scale**2, x)
    return (dx * _per_channel(scale if weight is None else scale * weight, x)).to(x.dtype)


KERNELS: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": _stats,
    "batch_norm_gather_stats_with_counts": _gather_stats,
    "batch_norm_elemt": _elemt,
    "batch_norm_backward_reduce": _backward_reduce,
    "batch_norm_backward_elemt": _backward_elemt,
}


@functools.cache
def register() -> torch.library.Library:
    """Registers the operators in this process for the devices that have none: the CPU, and fake tensors."""
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in KERNELS.items():
        library.impl(name, kernel, "CompositeExplicitAutograd")
    return library


def through(x: Tensor, dy: Tensor, weight: Tensor, kernel: Callable[[str], Callable[..., Any]]) -> dict[str, Tensor]:
    """What each kernel returns for a batch that two ranks share unequally."""
    parts = [_kernel(part, 1e-5) for _kernel in [kernel("batch_norm_stats")] for part in (x[:3], x[3:])]
    means, scales = (torch.stack(each) for each in zip(*parts, strict=True))
    counts = torch.tensor([3.0, len(x) - 3.0], device=x.device) * x[0, 0].numel()
    running = torch.zeros(2, len(weight), device=x.device)
    mean, scale = kernel("batch_norm_gather_stats_with_counts")(
        x, means, scales, running[0], running[1], 1.0, 1e-5, counts
    )
    y = kernel("batch_norm_elemt")(x, weight, weight, mean, scale, 1e-5)
    sums = kernel("batch_norm_backward_reduce")(dy, x, mean, scale, weight, True, True, True)
    dx = kernel("batch_norm_backward_elemt")(dy, x, mean, scale, weight, *sums[:2], counts.to(torch.int32))
    named = {"means": means, "scales": scales, "mean": mean, "scale": scale, "running": running, "y": y, "dx": dx}
    return named | {f"sum {number}": value for number, value in enumerate(sums)}


def torchs_own(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The function behind `torch.nn.SyncBatchNorm`, which itself refuses tensors on the CPU."""
    running = torch.zeros(2, len(weight))
    everyone = distributed.group()
    return SyncBatchNorm.apply(x, weight, bias, running[0], running[1], eps, 1.0, everyone, distributed.world_size())


class Traffic(TorchDispatchMode):
    """Within this context: names of the collectives, and bytes that operators read and write in large tensors.

    Args:
        least: number of elements from which a tensor counts as large.
    """

    def __init__(self, least: int = 1) -> None:
        super().__init__()
        self.least, self.num_bytes = least, 0
        self.collectives: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (collective := _collective(func)) is not None:
            self.collectives.append(collective)
        elif not func.is_view:
            tensors = [
                each for each in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)
            ]
            self.num_bytes += sum(x.numel() * x.element_size() for x in tensors if x.numel() >= self.least)
        return result


def counting_compiler(forward: list[str], backward: list[str]) -> Any:
    """A backend of `torch.compile` that notes the collectives of the graphs that it runs as they are."""

    def compiler(collectives: list[str]) -> Any:
        def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            collectives.extend(filter(None, (_collective(node.target) for node in graph.graph.nodes)))
            return graph.forward

        return compile_graph

    return aot_autograd(fw_compiler=compiler(forward), bw_compiler=compiler(backward))


def _collective(operator: Any) -> str | None:
    """The name of a collective, without its namespace; None for another operator."""
    if not isinstance(operator, torch._ops.OpOverload):
        return None
    namespace, _, name = operator._schema.name.partition("::")
    is_one = namespace in ("c10d", "_c10d_functional") and "wait" not in name and "wrap" not in name
    return name.removeprefix("_") if is_one else None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _per_channel(x: Tensor, like: Tensor) -> Tensor:
    return x.view([1, -1] + [1] * (like.dim() - 2))
