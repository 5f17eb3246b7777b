"""What the tests of methods share: one optimizer step, as the executor computes it, on micro-batches and on ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sslrun.contract import Batch, Method, PatchMask, Progress
from sslrun.runtime import distributed
from sslrun.training import joined

PROGRESS = Progress(step=3, total_steps=10, steps_per_epoch=5, seed=1)


@dataclass(frozen=True)
class Step:
    """What one optimizer step computes from the global batch.

    Attributes:
        loss: mean over micro-batches and ranks.
        gradients: likewise, by the parameter's name.
        carry: rows of all micro-batches and ranks, in the order of the global batch.
    """

    loss: float
    gradients: dict[str, Tensor]
    carry: dict[str, Tensor]


def piece(batch: Batch, first: int, size: int) -> Batch:
    """The samples `first` to `first + size` of a batch, all views of them."""
    rows = slice(first, first + size)

    def part(tensor: Tensor) -> Tensor:
        return torch.cat([view[rows] for view in tensor.split(len(batch.index))])

    masks = [
        None
        if mask is None
        else PatchMask(h := part(mask.hidden), int(h.sum()), None if mask.blocks is None else part(mask.blocks))
        for mask in batch.masks
    ]
    label = None if batch.label is None else batch.label[rows]
    return Batch([part(group) for group in batch.views], batch.index[rows], label, masks)


def pieces(batch: Batch, size: int) -> list[Batch]:
    return [piece(batch, first, size) for first in range(0, len(batch.index), size)]


def step(method: Method, batches: list[Batch], progress: Progress = PROGRESS) -> Step:
    """One optimizer step over this rank's micro-batches; no parameter moves."""
    method.zero_grad()
    with torch.no_grad():
        targets = method.targets(batches, progress)
    losses = []
    for batch, target in zip(batches, targets, strict=True):
        losses.append(method(batch, progress, target))
        (losses[-1].value / len(batches)).backward()
    value = torch.stack([loss.value.detach() for loss in losses]).mean()
    averages = gradients(method)
    distributed.all_reduce_mean_([value, *averages.values()])
    return Step(value.item(), averages, joined([loss.carry for loss in losses]))


def gradients(method: Method) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def longhand_step(loss: Tensor, method: Method) -> Step:
    """The step of a loss that the test itself computed from the networks of `method`; without a carry."""
    method.zero_grad()
    loss.backward()
    return Step(loss.item(), gradients(method), {})


def assert_close(actual: Step, expected: Step, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Compare loss, gradients and those rows of the carry that `expected` has."""
    torch.testing.assert_close(actual.loss, expected.loss, rtol=rtol, atol=0)
    assert expected.gradients, "nothing has a gradient"
    torch.testing.assert_close(actual.gradients, expected.gradients, rtol=rtol, atol=atol)
    carry = {name: actual.carry[name] for name in expected.carry}
    torch.testing.assert_close(carry, expected.carry, rtol=rtol, atol=atol)
