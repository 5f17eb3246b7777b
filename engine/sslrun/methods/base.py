"""What a self-supervised method is to the engine. A method is one file in this folder with one subclass of `Method`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sslrun.config.component import Component
from sslrun.data.batch import Batch


@dataclass(frozen=True)
class Progress:
    """Where the run stands, in optimiser steps. Schedules and random draws of a method are pure functions of it."""

    step: int
    total_steps: int
    steps_per_epoch: int
    seed: int

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def fraction(self) -> float:
        """Of the run, 0 to 1."""
        return self.step / self.total_steps

    def generator(self) -> torch.Generator:
        """A CPU generator that depends on (seed, step) alone: equal on every rank and after every resume."""
        return torch.Generator().manual_seed((self.seed << 31) + self.step)


@dataclass
class Loss:
    """What one micro-batch gave.

    Attributes:
        value: 0-d, mean over the micro-batch's samples; what is minimised.
        metrics: 0-d tensors for the log; they stay on the device.
        carry: tensors with one row per sample that `after_step` needs, without gradient.
    """

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    carry: dict[str, Tensor] = field(default_factory=dict)


# A parameter that the method sets by itself, and its new value as a function of the old; both whole, on every rank.
Rewrite = tuple[nn.Parameter, Callable[[Tensor], Tensor]]


class Method(nn.Module, Component, kind="methods"):
    """Networks as submodules, all state as parameters or buffers; `backbone` is what the run is for.

    Methods call no optimiser, write no parameters (they say what is to be written: `rewrites`) and know no ranks but
    through the gather functions of `sslrun.runtime.distributed`.
    """

    backbone: nn.Module

    num_views: int | None = None
    """Views of each picture that a recipe has to give, over all groups of views; None where that may vary."""

    compares_samples: bool = False
    """Whether the loss compares samples of a batch with one another. Those of all ranks, but of an accumulated global
    batch only those that are on the devices at once (what `targets` gathers beforehand does not count)."""

    num_classes: int | None = None
    """Classes of the labels that it learns from; None: it never looks at a label."""

    def prepare(self, num_samples: int) -> None:
        """Once, before anything else: how many samples there are. Where buffers of that length are made.

        A method with a `prepare` of its own has no loss on pictures that it does not train on (monitor.loss_interval).
        """

    def targets(self, batches: list[Batch], progress: Progress) -> list[Any]:
        """Without gradient, before any forward pass of a step: what each of its micro-batches is compared with.

        It sees all micro-batches of this rank at once, so that what must not depend on how a global batch is cut up
        (which samples share BatchNorm statistics in the key encoder) does not.
        """
        return [None] * len(batches)

    def forward(self, batch: Batch, progress: Progress, targets: Any) -> Loss:
        """The loss of one micro-batch."""
        raise NotImplementedError

    def teachers(self, progress: Progress) -> list[tuple[nn.Module, nn.Module, float]]:
        """(teacher, student, momentum): what the engine moves after each applied step, teacher = m t + (1 - m) s."""
        return []

    def after_step(self, progress: Progress, carry: dict[str, Tensor]) -> None:
        """Once per applied optimiser step, with the carries of the whole global batch in its order."""

    def rewrites(self, progress: Progress) -> list[Rewrite]:
        """Once per applied step, between the optimiser and the teachers."""
        return []

    def before_epoch(self, progress: Progress, features: Callable[[nn.Module], Tensor]) -> list[Rewrite]:
        """Before the first step of an epoch.

        Args:
            progress: of that step.
            features: runs a module of the method, in evaluation mode and without gradient, over the whole training set
                (centre crops) and returns its outputs, (n, D) float32 on the CPU, in the order of sample ids: those of
                this rank's share of the samples (`distributed.share`). Feature maps, (B, C, H, W) or lists of them, are
                averaged over positions, the last one.
        """
        return []

    def sampling_labels(self) -> Tensor | None:
        """(N,) int64 pseudo-labels whose clusters are drawn equally often, from the next epoch on; None: every sample
        once."""
        return None

    def predictor(self) -> nn.Module | None:
        """What maps pictures (B, 3, H, W) to scores of classes (B, K), where a method learns the classes of labels."""
        return None

    def chance_loss(self) -> float | None:
        """The loss of a network that cannot tell pictures apart, where the method has such a number."""
        return None
