"""LARS, layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017, arXiv 1708.03888), in the form of MMSelfSup."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

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
            weights, gradients, buffers, present = self._pieces(group)
            if not present:
                continue
            decay = group["weight_decay"]
            updates = list(torch._foreach_add(gradients, weights, alpha=decay)) if weights else []
            updates = [_laid_out_like(weight, update) for weight, update in zip(weights, updates, strict=True)]
            if group["lars_exclude"]:
                torch._foreach_mul_(updates, group["lr"])
            else:
                norms = self._norms(weights, gradients, present, group["params"][0].device)
                weight_norms, gradient_norms = norms.unbind()
                ratios = trust_ratios(weight_norms, gradient_norms, decay, group["eta"], group["eps"])
                scales = (ratios * group["lr"]).float().unbind()
                torch._foreach_mul_(updates, [scales[i] for i, here in enumerate(present) if here])
            torch._fused_sgd_(
                weights,
                updates,
                buffers if group["momentum"] else [],
                weight_decay=0.0,
                momentum=group["momentum"],
                lr=1.0,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                grad_scale=None,
                found_inf=self.found_inf,
            )

    def _pieces(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[bool]]:
        """(weights, gradients, buffers) of the parts of parameters on this rank, and which parameters have a part."""
        weights: list[Tensor] = []
        gradients: list[Tensor] = []
        buffers: list[Tensor] = []
        present: list[bool] = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            whole = (parameter.detach(), parameter.grad, state["momentum_buffer"])
            segments = self._segments.get(parameter)
            for offset, length in segments if segments is not None else [(0, -1)]:
                present.append(length != 0)
                if length:
                    pieces = whole if length < 0 else tuple(tensor[offset : offset + length] for tensor in whole)
                    for collected, piece in zip((weights, gradients, buffers), pieces, strict=True):
                        collected.append(piece)
        return weights, gradients, buffers, present

    def _norms(
        self, weights: list[Tensor], gradients: list[Tensor], present: list[bool], device: torch.device
    ) -> Tensor:
        """(2, parameters): the norms of whole parameters and of their gradients, float64."""
        columns: list[Tensor] = []
        if weights:
            norms = torch.stack([*torch._foreach_norm(weights), *torch._foreach_norm(gradients)])
            columns = list(norms.double().square().view(2, -1).unbind(1))
        if len(columns) < len(present):
            here, nothing = iter(columns), torch.zeros(2, dtype=torch.float64, device=device)
            columns = [next(here) if is_here else nothing for is_here in present]
        squares = torch.stack(columns, dim=1)
        return (self._reduce(squares) if self._segments else squares).sqrt()


def _laid_out_like(weight: Tensor, update: Tensor) -> Tensor:
    """The update with the strides of its weight: on the CPU torch's fused update assumes equal strides."""
    strides = zip(weight.shape, weight.stride(), update.stride(), strict=True)
    if all(ours == theirs for size, ours, theirs in strides if size > 1):
        return update
    return torch.empty_like(weight).copy_(update)


def trust_ratios(weights: Tensor, gradients: Tensor, weight_decay: float | Tensor, eta: float, eps: float) -> Tensor:
    """The trust ratios of parameters, given the norms of their weights and of their gradients."""
    ratios = eta * weights / (gradients + weight_decay * weights + eps)
    return torch.where((weights > 0) & (gradients > 0), ratios, 1.0)
