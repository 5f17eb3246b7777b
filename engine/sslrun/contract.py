"""What a user's own class meets: the data that flows between the engine and a method, and the two classes to extend.

`Batch` comes in, `Loss` goes out, `Progress` says where the run stands. A method is a subclass of `Method`, a network
a subclass of `Backbone`. The executor, the monitors and the loader are typed by this file and know no method.

Legend: B samples, C H W channels, height and width, D features, K classes, N samples of the data set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sslrun.config.component import Component
from sslrun.errors import UsageError
from sslrun.randomness import step_generator


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank. B samples.

    Attributes:
        views: one tensor per view group, view-major, (num_views x B) 3 H W, float, normalized, channels-last: row i and
            row i + B of a group are two views of one image.
        index: B, int64, sample ids in the source.
        label: B, int64, or None where the source has no labels. Only probes may read it.
    """

    views: list[torch.Tensor]
    index: torch.Tensor
    label: torch.Tensor | None

    def crops(self) -> list[torch.Tensor]:
        """Every view of every group by itself, each (B, 3, H, W), in the order of the recipe."""
        return [view for group in self.views for view in group.split(len(self.index))]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; copies do not wait."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch([move(v) for v in self.views], move(self.index), None if self.label is None else move(self.label))


@dataclass(frozen=True)
class Progress:
    """Where the run stands, in optimizer steps. Schedules and random draws of a method are pure functions of it."""

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
        return step_generator(self.seed, self.step)


@dataclass
class Loss:
    """What one micro-batch gave.

    Attributes:
        value: 0-d, mean over the micro-batch's samples; what is minimized.
        metrics: 0-d tensors for the log; they stay on the device.
        carry: tensors with one row per sample that `after_step` needs, without gradient.
    """

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    carry: dict[str, Tensor] = field(default_factory=dict)


# A parameter that the method sets by itself, and its new value as a function of the old; both whole, on every rank.
Rewrite = tuple[nn.Parameter, Callable[[Tensor], Tensor]]


class PartitionedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose update looks at whole parameters, at their norms for instance.

    Under ZeRO it has to know which part of which parameter its flat tensors hold. Optimizers that treat every number
    alike need nothing of the kind.
    """

    def set_segments(
        self,
        segments: dict[Tensor, Sequence[tuple[int, int]]],
        reduce: Callable[[Tensor], Tensor],
    ) -> None:
        """Say what each flat partition is made of; called once, before the first step.

        Args:
            segments: for each flat tensor, (offset, length) of what it holds of each parameter of the partitioned
                group, in the same order on all ranks; length 0 where another rank holds all of it.
            reduce: sums a tensor over the ranks that share the parameters.
        """
        raise NotImplementedError


class Backbone(nn.Module, Component, kind="backbones"):
    """Images in, feature maps out.

    `forward((B, C, H, W))` returns feature maps, (B, C', H', W') each, or features (B, C'); the last is what necks and
    evaluation use. `num_features` is its number of channels.
    """

    num_features: int

    def forward(self, images: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def layers(self) -> list[list[str]]:
        """Names of its parts from the input to the output, those of one depth together: what a layer-wise decay of the
        learning rate counts. What is not named (a last norm) lies as high as a classifier."""
        raise UsageError(f"{type(self).__name__} does not say which of its layers lies how deep")

    def branches(self) -> list[nn.Module]:
        """The parts whose output is added to what goes past them, from the input to the output: what stochastic depth
        leaves out."""
        raise UsageError(f"{type(self).__name__} does not say what its residual branches are")


class Method(nn.Module, Component, kind="methods"):
    """Networks as submodules, all state as parameters or buffers; `backbone` is what the run is for.

    Methods call no optimizer, write no parameters (they say what is to be written: `rewrites`) and know no ranks but
    through the gather functions of `sslrun.runtime.distributed`.
    """

    backbone: Backbone

    num_views: int | None = None
    """Views of each image that a recipe has to give, over all groups of views; None where that may vary."""

    compares_samples: bool = False
    """Whether the loss compares samples of a batch with one another. Those of all ranks, but of an accumulated global
    batch only those that are on the devices at once (what `targets` gathers beforehand does not count)."""

    num_classes: int | None = None
    """Number of classes of the labels that the method learns from; None if it reads no labels."""

    remembers_samples: bool = False
    """Whether it keeps something of each training sample (in buffers that `prepare` makes). Such a method has no loss
    on images that it does not train on, so `monitor.loss_interval` is refused."""

    draws_clusters: bool = False
    """Whether `sampling_labels` decides which samples an epoch draws."""

    uncompiled: tuple[str, ...] = ()
    """Names of submodules that `engine.compile` leaves as they are."""

    def prepare(self, num_samples: int) -> None:
        """Called once, before anything else, with the number of training samples: the place to make buffers that have a
        row for each sample. See `remembers_samples`."""

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
        """Once per applied optimizer step, with the carries of the whole global batch in its order."""

    def rewrites(self, progress: Progress) -> list[Rewrite]:
        """Once per applied step, between the optimizer and the teachers."""
        return []

    def before_epoch(self, progress: Progress, features: Callable[[nn.Module], Tensor]) -> list[Rewrite]:
        """Before the first step of an epoch.

        Args:
            progress: of that step.
            features: runs a module of the method, in evaluation mode and without gradient, over the whole training set
                (center crops) and returns its outputs, (n, D) float32 on the CPU, in the order of sample ids: those of
                this rank's share of the samples (`distributed.share`). Feature maps, (B, C, H, W) or lists of them, are
                averaged over positions, the last one.
        """
        return []

    def sampling_labels(self) -> Tensor:
        """(N,) int64 pseudo-labels whose clusters the next epoch draws equally often; asked if `draws_clusters`."""
        raise NotImplementedError

    def predictor(self) -> nn.Module | None:
        """What maps images (B, 3, H, W) to scores of classes (B, K), where a method learns the classes of labels."""
        return None

    def chance_loss(self) -> float | None:
        """The loss of a network that cannot tell images apart, where the method has such a number."""
        return None
