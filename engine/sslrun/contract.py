"""The contract between the engine and your own classes: the data they exchange, and the classes to extend.

A method is a subclass of `Method`, a network a subclass of `Backbone`. For each micro-batch a method gets a `Batch` and
the `Progress` of the run, and returns a `Loss`. The executor, the monitors and the loader use only these classes, never
a particular method.

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
class PatchMask:
    """Which of the T patches of each of N views are hidden from the network. The host knows how many, so that shapes do
    not depend on the values of tensors.

    Attributes:
        hidden: (N, T) bool, True where a patch is hidden; patches are counted row by row.
        num_hidden: number of hidden patches of all views together.
        blocks: (N, M, n) int64, places of the hidden patches in M blocks of each view, which a method predicts one by
            one; None if the mask has no blocks.
    """

    hidden: torch.Tensor
    num_hidden: int
    blocks: torch.Tensor | None = None

    @property
    def hidden_per_view(self) -> int:
        """Number of hidden patches of each view.

        Raises:
            UsageError: the views cannot all have the same number.
        """
        count, rest = divmod(self.num_hidden, len(self.hidden))
        if rest:
            raise UsageError("the method needs a mask that hides the same number of patches of every view")
        return count

    def after(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "PatchMask":
        """The same mask after a function of each of its tensors, such as a copy to a device."""
        blocks = None if self.blocks is None else function(self.blocks)
        return PatchMask(function(self.hidden), self.num_hidden, blocks)

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The visible patches (N, T - n) and the hidden patches (N, n) of each view, int64, both in the order of the
        image; n is `hidden_per_view`."""
        order = self.hidden.to(torch.uint8).argsort(dim=1, stable=True)
        visible = self.hidden.shape[1] - self.hidden_per_view
        return order[:, :visible], order[:, visible:]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, of B samples.

    Attributes:
        views: one tensor per view group, (num_views x B, 3, H, W), normalized, channels-last, view-major: rows i and
            i + B of a group are two views of one image. float32; bfloat16 on CUDA if the step's precision is bf16.
        index: (B,) int64, sample ids in the source.
        label: (B,) int64, or None if the source has no labels. Only supervised methods may read it.
        masks: one mask per view group, of num_views x B views, view-major, or None if the group has none; empty if no
            group has one.
    """

    views: list[torch.Tensor]
    index: torch.Tensor
    label: torch.Tensor | None
    masks: list[PatchMask | None] = field(default_factory=list)

    def crops(self) -> list[torch.Tensor]:
        """Each view as a separate tensor (B, 3, H, W), in the order of the recipe, over all groups."""
        return [view for group in self.views for view in group.split(len(self.index))]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; the host does not wait for the copies."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        label = None if self.label is None else move(self.label)
        masks = [None if mask is None else mask.after(move) for mask in self.masks]
        return Batch([move(v) for v in self.views], move(self.index), label, masks)


@dataclass(frozen=True)
class Progress:
    """The position in the run. Schedules and random draws of a method are pure functions of it.

    Attributes:
        step: number of optimizer steps before this one.
        total_steps: number of optimizer steps of the run.
        steps_per_epoch: number of optimizer steps per epoch.
        seed: seed of the run.
    """

    step: int
    total_steps: int
    steps_per_epoch: int
    seed: int

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def fraction(self) -> float:
        """Share of the run that is over, 0 to 1."""
        return self.step / self.total_steps

    def generator(self) -> torch.Generator:
        """A CPU generator that depends on (seed, step) alone: equal on every rank and after every resume."""
        return step_generator(self.seed, self.step)


@dataclass(frozen=True)
class Pooled:
    """A metric that is no mean over samples, such as a standard deviation, in parts that can be added up.

    The engine adds the sums of all micro-batches and ranks: the metric is that of the global batch, however the
    hardware divides it.

    Attributes:
        sums: sums over the micro-batch's samples, of any shape, on the device.
        value: the function from the added sums to the metric, 0-d.
    """

    sums: Tensor
    value: Callable[[Tensor], Tensor]


@dataclass
class Loss:
    """The result of one micro-batch.

    Attributes:
        value: 0-d, the loss to minimize, a mean over the micro-batch's samples.
        metrics: for the log: 0-d tensors on the device that are means over the micro-batch's samples, or `Pooled`.
        carry: tensors for `after_step`, without gradient, with one row per sample.
    """

    value: Tensor
    metrics: dict[str, Tensor | Pooled] = field(default_factory=dict)
    carry: dict[str, Tensor] = field(default_factory=dict)


# A parameter, and the function from its old to its new value; both values are unsharded, on every rank.
Rewrite = tuple[nn.Parameter, Callable[[Tensor], Tensor]]


class PartitionedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose update depends on whole parameters, for example on their norms.

    Under ZeRO it has to know which parts of which parameters its flat tensors hold. Optimizers that treat every element
    alike are ordinary torch optimizers.
    """

    def set_segments(
        self,
        segments: dict[Tensor, Sequence[tuple[int, int]]],
        reduce: Callable[[Tensor], Tensor],
    ) -> None:
        """Sets which parts of parameters each flat partition holds; called once, before the first step.

        Args:
            segments: for each flat tensor, (offset, length) of its part of each parameter of the group, in the same
                order on all ranks; length 0 if it has no part of a parameter.
            reduce: sums a tensor over the ranks that share the parameters.
        """
        raise NotImplementedError


class Backbone(nn.Module, Component, kind="backbones"):
    """A network from images to feature maps.

    `forward` takes images (B, C, H, W) and returns a list of feature maps (B, C', H', W') or features (B, C'). Necks
    and evaluations use the last element.

    Attributes:
        num_features: number of channels of the last feature map.
    """

    num_features: int

    def forward(self, images: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def layers(self) -> list[list[str]]:
        """Names of submodules and parameters from the input to the output, one list for each depth.

        Layer-wise decay of the learning rate (`layer_decay`) counts these lists. Unnamed parameters, such as those of a
        last norm, get the classifier's rate.
        """
        raise UsageError(f"layer_decay needs the depth of layers, but {type(self).__name__} has no layers()")

    def branches(self) -> list[nn.Module]:
        """The residual branches from the input to the output: modules whose output is added to their input. Stochastic
        depth (`drop_path`) drops them."""
        raise UsageError(f"drop_path needs the residual branches, but {type(self).__name__} has no branches()")


class Method(nn.Module, Component, kind="methods"):
    """A self-supervised method: networks as submodules, all further state as buffers, and the loss.

    A method calls no optimizer, writes no parameter (the engine writes what `rewrites` returns) and communicates with
    other ranks only through the gather functions of `sslrun.runtime.distributed`. Its class attributes state what it
    needs. Random numbers come from `Progress.generator`, or from torch's global generators, which the engine seeds for
    each part of a step (`Executor.seed`). With CUDA graphs the next step overwrites what networks return in this one:
    a method keeps copies alone, in buffers.

    Attributes:
        backbone: the encoder that the run trains.
    """

    backbone: Backbone

    num_views: int | None = None
    """Number of views of each image, over all view groups, that the method takes; None for any number."""

    needs_masks: bool = False
    """Whether every view group of the recipe must have a mask; the method finds them in `Batch.masks`."""

    compares_samples: bool = False
    """Whether the loss compares the samples of a batch with each other (samples gathered by `targets` do not count). A
    method that has `embed` and `compare` instead of `forward` compares the whole global batch under accumulation too;
    otherwise accumulation restricts the comparison to one micro-batch of all ranks, and the engine reports it."""

    num_classes: int | None = None
    """Number of classes of the labels that the method learns from; None if it reads no labels."""

    remembers_samples: bool = False
    """Whether the method has state for each training sample, in buffers that `prepare` creates. It then has no loss on
    other images, so `monitor.loss_interval` is refused."""

    is_measured_by_knn: bool = True
    """Whether the k-NN accuracy of the features says how good they are. It does not for methods that predict pixels or
    gradients: a linear probe or fine-tuning does, and the engine says so."""

    draws_clusters: bool = False
    """Whether `sampling_labels` decides which samples an epoch draws."""

    uncompiled: tuple[str, ...] = ()
    """Names of submodules that `engine.compile` does not compile."""

    def prepare(self, num_samples: int) -> None:
        """Creates the buffers that have a row for each training sample; called once, before anything else. See
        `remembers_samples`."""

    def frozen_weights(self) -> dict[str, str]:
        """The files with the weights of frozen networks, by the networks' names in the method. A new run reads them;
        a resumed one has the weights in its checkpoint."""
        return {}

    def targets(self, batches: list[Batch], progress: Progress) -> list[Any]:
        """The targets of each micro-batch, computed without gradient before the first forward pass of a step.

        It gets all micro-batches of this rank at once, for targets that must not depend on accumulation: for example,
        keys from an encoder whose BatchNorm groups are shuffled over the global batch.

        Returns:
            The third argument of `forward`, for each micro-batch.
        """
        return [None] * len(batches)

    def forward(self, batch: Batch, progress: Progress, targets: Any) -> Loss:
        """The loss of one micro-batch."""
        return self.compare(self.embed(batch, progress), progress)

    def embed(self, batch: Batch, progress: Progress) -> list[Tensor]:
        """Embeddings of a micro-batch from which `compare` computes the loss: tensors with one row for each sample, in
        the order of the batch. No sample's row may depend on other samples, except through batch statistics."""
        raise NotImplementedError

    def compare(self, embedded: list[Tensor], progress: Progress) -> Loss:
        """The loss of all samples of this rank, whose embeddings are given; others are gathered by the loss."""
        raise NotImplementedError

    @property
    def embeds(self) -> bool:
        """Whether the method has `embed` and `compare`."""
        return type(self).embed is not Method.embed

    def teachers(self, progress: Progress) -> list[tuple[nn.Module, nn.Module, float]]:
        """(teacher, student, momentum) of each momentum encoder. After each applied step the engine sets teacher =
        momentum * teacher + (1 - momentum) * student."""
        return []

    def after_step(self, progress: Progress, carry: dict[str, Tensor]) -> None:
        """Updates queues, banks and the like; called once per applied optimizer step.

        Args:
            progress: the position after the step.
            carry: the carries of the whole global batch, in its order.
        """

    def rewrites(self, progress: Progress) -> list[Rewrite]:
        """Parameters to set after an applied step, after the optimizer's update and before the teachers'."""
        return []

    def before_epoch(self, progress: Progress, features: Callable[[nn.Module], Tensor]) -> list[Rewrite]:
        """Called before the first step of an epoch; returns parameters to set. A run that is stopped at this place and
        resumed calls it again.

        Args:
            progress: the position before that step.
            features: runs a module of the method over center crops of the whole training set, in evaluation mode and
                without gradient. It returns the outputs of this rank's share of the samples (`distributed.share`), in
                the order of sample ids, (n, D) float32 on the CPU. It uses the last of a list of outputs, and averages
                feature maps (B, C, H, W) over positions.
        """
        return []

    def sampling_labels(self) -> Tensor:
        """(N,) int64 pseudo-labels whose clusters the next epoch draws equally often; called if `draws_clusters`."""
        raise NotImplementedError

    def predictor(self) -> nn.Module | None:
        """A module from images (B, 3, H, W) to class scores (B, K), if the method learns the classes of labels."""
        return None

    def chance_loss(self) -> float | None:
        """The loss of a network that cannot tell images apart; None if it is unknown."""
        return None

    def reconstructed(self, images: Tensor, mask: PatchMask) -> Tensor | None:
        """The images with the predicted pixels in the hidden patches, (N, C, H, W), normalized like `images`; None if
        the method predicts no pixels. The report shows them.

        Args:
            images: (N, C, H, W), normalized.
            mask: the same number of hidden patches of each image.
        """
        return None
