"""LARS, layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017, arXiv 1708.03888), in the form of MMSelfSup."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels.lars_update import lars_update_, square_sums
from sslrun.contract import PartitionedOptimizer


class LARS(PartitionedOptimizer):
    """SGD with momentum whose step for each parameter w is scaled by its trust ratio.

        trust = eta |w| / (|g| + weight_decay |w| + eps), 1 if either norm is 0 or the group has `lars_exclude`
        d = trust lr (g + weight_decay w);  m = momentum m + d;  w = w - m

    The momentum buffer contains the learning rate, as in MMSelfSup, so a later change of lr does not affect earlier
    updates in the buffer. All parameters are updated together; norms stay on the device. If the `found_inf` tensor
    (0-d float) is 1, weights and buffers do not change, as in torch's fused optimizers.

    If the parameters are flat partitions of many parameters (ZeRO), `set_segments` says where each of them lies.

    Args:
        params: parameters or groups of them; a group may set `lars_exclude=True`.
        lr: learning rate.
        momentum: decay of the momentum buffer.
        weight_decay: factor of the L2 penalty, which is part of the gradient and of the trust ratio.
        eta: trust coefficient.
        eps: number added to the denominator of the trust ratio.
    """

    _step_supports_amp_scaling = True  # torch's sign that an optimizer obeys `found_inf`
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        eta: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "eps": eps}
        super().__init__(params, {**defaults, "lars_exclude": False})
        self._segments: dict[Tensor, Sequence[tuple[int, int]]] = {}
        self._reduce: Callable[[Tensor], Tensor] = lambda squares: squares

    def set_segments(
        self, segments: dict[Tensor, Sequence[tuple[int, int]]], reduce: Callable[[Tensor], Tensor]
    ) -> None:
        self._segments, self._reduce = segments, reduce

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights, gradients, buffers = self._pieces(group)
            if not weights:
                continue
            decay = group["weight_decay"]
            if group["lars_exclude"]:
                scales = torch.full((len(weights),), group["lr"], dtype=torch.float64, device=weights[0].device)
            else:
                squares = square_sums(weights, gradients)
                weight_norms, gradient_norms = (self._reduce(squares) if self._segments else squares).sqrt().unbind()
                scales = trust_ratios(weight_norms, gradient_norms, decay, group["eta"], group["eps"]) * group["lr"]
            lars_update_(weights, gradients, buffers, scales, group["momentum"], decay, self.found_inf)

    def _pieces(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """(weights, gradients, buffers) of this rank's parts of parameters; a part may be empty."""
        weights: list[Tensor] = []
        gradients: list[Tensor] = []
        buffers: list[Tensor] = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state, weight = self.state[parameter], parameter.detach()
            buffer = state.get("momentum_buffer")
            buffer = torch.zeros_like(weight) if buffer is None else _laid_out_like(weight, buffer)
            state["momentum_buffer"] = buffer
            whole = (weight, _laid_out_like(weight, parameter.grad), buffer)
            segments = self._segments.get(parameter)
            parts = [whole] if segments is None else [[x[at : at + n] for x in whole] for at, n in segments]
            for part in parts:
                for collected, piece in zip((weights, gradients, buffers), part, strict=True):
                    collected.append(piece)
        return weights, gradients, buffers


def _laid_out_like(weight: Tensor, other: Tensor) -> Tensor:
    """The other tensor, or a copy of it, with the strides of its weight: the fast update needs equal strides."""
    strides = zip(weight.shape, weight.stride(), other.stride(), strict=True)
    if all(ours == theirs for size, ours, theirs in strides if size > 1):
        return other
    return torch.empty_like(weight).copy_(other)


def trust_ratios(weights: Tensor, gradients: Tensor, weight_decay: float | Tensor, eta: float, eps: float) -> Tensor:
    """The trust ratios of parameters, given the norms of their weights and of their gradients."""
    ratios = eta * weights / (gradients + weight_decay * weights + eps)
    return torch.where((weights > 0) & (gradients > 0), ratios, 1.0)
