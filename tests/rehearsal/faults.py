"""Recipes with a planted fault each: the negative controls. A rehearsal that does not find them proves nothing."""

from typing import Any

import torch
from torch import Tensor

from rehearsal.cases import SHUFFLE, Case
from sslrun.contract import Batch, Loss, Progress
from sslrun.methods.moco import MoCo


class Faulty(MoCo):
    """MoCo with one line too many."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.table = torch.ones(64)  # neither a parameter nor a buffer: stays in host memory

    def forward(self, batch: Batch, progress: Progress, targets: Tensor) -> Loss:
        loss = super().forward(batch, progress, targets)
        return Loss(loss.value * self.fault(batch), loss.metrics, loss.carry)

    def fault(self, batch: Batch) -> Any:
        """A factor of the loss."""
        raise NotImplementedError


class HasNoFault(Faulty):
    """As the others, without a fault."""

    def fault(self, batch: Batch) -> Any:
        return 1.0


class ReadsNumber(Faulty):
    """Asks for a number of the device."""

    def fault(self, batch: Batch) -> Any:
        return 1.0 if batch.index.sum().item() < 0 else 2.0


class Branches(Faulty):
    """Decides by a value of the device."""

    def fault(self, batch: Batch) -> Any:
        return 1.0 if (batch.index < 0).any() else 2.0


class SelectsByMask(Faulty):
    """Makes a tensor whose size only the device knows."""

    def fault(self, batch: Batch) -> Any:
        kept = torch.ones(len(batch.index), device=batch.index.device)
        kept[batch.index > 3] = kept[: len(kept)] * 2
        return kept.mean()


class SelectsByList(Faulty):
    """Indexes by a list of Python's."""

    def fault(self, batch: Batch) -> Any:
        return batch.index[[0, 1]].float().mean()


class CopiesNumbers(Faulty):
    """Makes a tensor of Python's numbers on the device."""

    def fault(self, batch: Batch) -> Any:
        return torch.tensor([1.0, 2.0], device=batch.index.device).mean()


class CopiesToPageable(Faulty):
    """Copies asynchronously to memory that is not pinned, so not asynchronously."""

    def fault(self, batch: Batch) -> Any:
        torch.empty(len(batch.index), dtype=torch.long).copy_(batch.index, non_blocking=True)
        return 1.0


class KeepsTableOnHost(Faulty):
    """Computes with a tensor that did not move to the device."""

    def fault(self, batch: Batch) -> Any:
        return self.table[0:1].to(batch.index.device, non_blocking=True) * (self.table[:2] + batch.index[:2]).mean()


class ComputesOnHost(Faulty):
    """Computes on the host what belongs on the device."""

    def fault(self, batch: Batch) -> Any:
        return (self.table * 2).to(batch.index.device, non_blocking=True).mean()


class HasWrongShape(Faulty):
    """Adds what does not broadcast."""

    def fault(self, batch: Batch) -> Any:
        return (self.queue.rows[:3] + self.queue.rows[:2]).mean()


class MultipliesInFloat32(Faulty):
    """A matrix product outside of autocast."""

    def fault(self, batch: Batch) -> Any:
        with torch.autocast("cuda", enabled=False):
            return (self.queue.rows @ self.queue.rows.T).mean()


class HasStrangeGradient(Faulty):
    """Gradients of convolutions that lie in memory otherwise than their weights."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.has_hooks = False

    def fault(self, batch: Batch) -> Any:
        if not self.has_hooks:
            self.has_hooks = True
            for parameter in self.backbone.parameters():
                if parameter.dim() == 4:
                    parameter.register_post_accumulate_grad_hook(_lay_out)
        return 1.0


class KeepsActivations(Faulty):
    """Holds memory that no estimate of a single step can know."""

    def fault(self, batch: Batch) -> Any:
        self.kept = [*getattr(self, "kept", []), torch.empty(2**26, device=batch.index.device)]
        return 1.0


def _lay_out(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad = parameter.grad.contiguous(memory_format=torch.contiguous_format)


# What is found of each: words of a problem that `checks.problems` names; None for none at all.
FOUND = {
    "HasNoFault": None,
    "ReadsNumber": "waits: item",
    "Branches": "waits: item",
    "SelectsByMask": "waits: aten::index_put_ by a mask",
    "SelectsByList": "waits: copy cpu to cuda of (2,)",
    "CopiesNumbers": "waits: copy cpu to cuda of (2,)",
    "CopiesToPageable": "waits: copy cuda to cpu",
    "KeepsTableOnHost": "Expected all tensors to be on the same device",
    "ComputesOnHost": "computes in host memory: aten::mul",
    "HasWrongShape": "fails: ",
    "MultipliesInFloat32": "multiplies in float32: aten::mm",
    "HasStrangeGradient": "strides differ",
    "KeepsActivations": "memory: ",
}

CASES = {
    name: Case(
        "configs/quickstart.toml",
        ("data.samples_per_gpu=256",),  # a batch that outweighs the weights, as in a recipe
        on_host=(SHUFFLE,),
        fault=(f"model.type={name}", f"custom_imports=['{__name__}']"),
    )
    for name in FOUND
}
