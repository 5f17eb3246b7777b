"""Random numbers within a network that depend neither on ranks nor on micro-batches.

A network does not know which samples of the global batch it sees. So the executor writes two numbers to each part that
draws, before every forward pass of a micro-batch: a key, which is equal on all ranks, and the number of the micro-batch
in the global batch. They are tensors: a compiled network, or a CUDA graph, reads new numbers where the last ones were.
"""

import torch
from torch import Tensor, nn

from sslrun.randomness import INCREMENT, Phase, key_of, mixed_


class Drawing(nn.Module):
    """A part of a network that draws random numbers in training, unless `draws` is false.

    Its draws are functions of `next_key` and of positions in the global batch. Without an executor, the keys are those
    of a run's first passes, and all rows of a pass are one group.

    Attributes:
        draws: whether it draws; momentum encoders do not.
        group_size: number of samples of a group, `data.samples_per_gpu`; 0 for all rows.
        num_groups: number of groups in a micro-batch.
        key: int64, 0-d, changes with each forward pass. Like the next one, it belongs to no state.
        micro_batch: int64, 0-d, number of the micro-batch in the global batch.
    """

    key: Tensor
    micro_batch: Tensor
    draws = True

    def __init__(self) -> None:
        super().__init__()
        self.group_size, self.num_groups = 0, 1
        for name in ("key", "micro_batch"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long), persistent=False)

    @property
    def is_drawing(self) -> bool:
        return self.training and self.draws

    def next_key(self) -> Tensor:
        """int64, 0-d, on the device: another one for each forward pass of a micro-batch, equal on all ranks. To be
        called once in a pass, and not within what activation checkpointing computes again."""
        self.key.add_(INCREMENT)
        return mixed_(self.key.clone())

    def strata(self, rows: int) -> tuple[int, Tensor]:
        """The groups of a pass: their size, and a number of each in the global batch, int64 (rows / size,), that no
        other has.

        Args:
            rows: number of rows of the pass: views of the micro-batch, view-major. If they are not, they are one group,
                which differs between divisions of the global batch.
        """
        samples = self.group_size * self.num_groups
        is_of_views = samples > 0 and rows % samples == 0
        size, groups = (self.group_size, self.num_groups) if is_of_views else (rows, 1)
        view = torch.arange(rows // (size * groups), device=self.key.device) << 32
        group = self.micro_batch * groups + torch.arange(groups, device=self.key.device)
        return size, (view.unsqueeze(1) + group).flatten()


def drawing_parts(network: nn.Module) -> list[Drawing]:
    """The parts of a network that draw in training."""
    return [part for part in network.modules() if isinstance(part, Drawing) and part.draws]


def begin(parts: list[Drawing], seed: int, step: int, phase: Phase, micro_batch: int) -> None:
    """Sets what the next forward passes draw; the device is not waited for.

    Args:
        parts: `drawing_parts`.
        seed: the run's seed.
        step: number of optimizer steps before this one.
        phase: the part of the step that follows.
        micro_batch: number of the micro-batch in the global batch.
    """
    for number, part in enumerate(parts):
        part.key.fill_(key_of(seed, step, phase, number))
        part.micro_batch.fill_(micro_batch)
