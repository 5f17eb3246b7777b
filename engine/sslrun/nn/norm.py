"""Batch normalization whose statistics are defined by the recipe, not by the hardware.

`samples_per_gpu` of a recipe is the size of the group over which BatchNorm computes its statistics. A device may hold
many groups at once, or one after the other (gradient accumulation), or share them with other ranks: `GroupBatchNorm`
computes the same in all cases.

Training normalizes each group by its own mean and variance. The running statistics, which evaluation uses, are updated
once per applied optimizer step, with the mean over all groups of the step: over all forward passes of a layer, all
micro-batches and all ranks (`RunningStatistics`). A skipped step does not change them. (torch updates them in each
forward pass: with two views, or two micro-batches, twice per step.)

torch's own BatchNorm layers in a user's network become such layers when the model is built (`convert_batch_norms`).
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from sslrun.config.component import Component
from sslrun.errors import UsageError
from sslrun.nn.normalization import Shape, by_formula, over_ranks_by_kernels
from sslrun.runtime.distributed import all_reduce_mean_, world_size
from sslrun.runtime.network_draws import Drawing

COLUMNS = 8  # 16 bytes of the smallest dtype
# Subclasses of torch's layers whose forward normalizes and then calls these members in turn.
CALLED_AFTER = {"timm.layers.norm_act.BatchNormAct2d": ("drop", "act")}


class Norm(Component, kind="norms"):
    """The kind of normalization layer that a network uses."""

    def layer(self, num_features: int, affine: bool = True) -> nn.Module:
        """A new layer for `num_features` channels; never with scale and shift if `affine` is false."""
        raise NotImplementedError


class BN(Norm):
    """Batch normalization over groups of `data.samples_per_gpu` samples (Ioffe & Szegedy 2015, arXiv 1502.03167).

    Args:
        eps: number added to the variance for numerical stability.
        momentum: weight of a step's statistics in the update of the running statistics, 0 to 1.
        affine: whether each channel learns a scale and a shift.
    """

    def __init__(self, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        self.eps, self.momentum, self.affine = eps, momentum, affine

    def layer(self, num_features: int, affine: bool = True) -> nn.Module:
        return GroupBatchNorm(num_features, self.eps, self.momentum, self.affine and affine)


class SyncBN(BN):
    """Batch normalization over the global batch; with engine.split_sync_bn, over one micro-batch of all ranks."""

    def layer(self, num_features: int, affine: bool = True) -> nn.Module:
        return GroupBatchNorm(num_features, self.eps, self.momentum, self.affine and affine, sync=True)


class GroupBatchNorm(nn.Module):
    """BatchNorm over (V x G x n) rows, view-major: each of the G groups of n samples (all V views of them) has its own
    statistics. Takes (rows, C, ...); parameter and buffer names are those of `torch.nn.BatchNorm2d`.

    Attributes:
        momentum: weight of a step in the update of the running statistics; None for the mean over all steps.
        sync: whether all rows of all ranks are one group.
        group_size: number n of samples in a group.
        num_groups: number G of groups in a micro-batch.
        running_mean: (C,). Without running statistics this, `running_var` and `num_batches_tracked` are None, and
            evaluation normalizes by the statistics of its batch.
        pending: (3, C) sums over the forward passes since the last step: mean, unbiased variance, number of passes.
            C is rounded up to a multiple of `COLUMNS`, so that every row begins at a multiple of 16 bytes.
        one_pass: as `pending`: zeros, and a 1 for the number of passes.
    """

    momentum: float | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    pending: Tensor
    one_pass: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True, sync: bool = False
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if affine else None)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self._begin(sync, torch.zeros(()))

    def _begin(self, sync: bool, like: Tensor) -> None:
        """Sets the attributes that torch's BatchNorm does not have; buffers get dtype and device of `like`."""
        self.sync = sync
        self.group_size, self.num_groups = 0, 1  # until `set_groups` is called, all rows are one group
        one_pass = like.new_zeros(3, -(-self.num_features // COLUMNS) * COLUMNS)
        self.register_buffer("pending", one_pass.clone(), persistent=False)
        one_pass[2] = 1
        self.register_buffer("one_pass", one_pass, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(x, mean, var, self.weight, self.bias, training=mean is None, eps=self.eps)
        options = self.one_pass, self.weight, self.bias, self.eps
        is_over_ranks, is_compiling = self.sync and world_size() > 1, torch.compiler.is_compiling()
        if is_over_ranks and _is_for_kernels(x, self.one_pass):
            y, statistics = over_ranks_by_kernels(x, *options)
        elif is_over_ranks or is_compiling:
            y, statistics = by_formula(x, self._shape(len(x)), *options, is_over_ranks)
        else:
            y, statistics = _group_by_group(x, self._shape(len(x)), *options)
        if self.running_mean is not None:
            self.pending.add_(statistics)
        return y

    def _shape(self, rows: int) -> Shape:
        """(V, G, n) for a number of rows."""
        if self.num_groups == 1:
            return 1, 1, rows
        samples = self.num_groups * self.group_size
        assert rows % samples == 0, f"{rows} rows are not views of {samples} samples"
        return rows // samples, self.num_groups, self.group_size

    def extra_repr(self) -> str:
        return f"{self.num_features}, groups={self.num_groups}x{self.group_size or 'all'}"


def _is_for_kernels(x: Tensor, one_pass: Tensor) -> bool:
    """Whether torch's CUDA kernels can normalize over ranks; they move far less memory than the formula does without a
    compiler."""
    is_wide = torch.promote_types(x.dtype, torch.float32) == one_pass.dtype
    return x.is_cuda and is_wide and not torch.compiler.is_compiling()


def _group_by_group(
    x: Tensor, shape: Shape, one_pass: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """torch's BatchNorm on each group; without a compiler, 4 times as fast as the formula on a CPU."""
    num_views, num_groups, group_size = shape
    channels = x.shape[1]
    if num_groups == 1:
        statistics = one_pass.clone()  # BatchNorm fills in mean and variance
        mean, var, _ = (statistics if statistics.shape[1] == channels else statistics[:, :channels]).unbind()
        return F.batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0, eps=eps), statistics
    if num_views == 1:  # slices of the batch, without a copy
        groups = x.split(group_size)
    else:
        groups = tuple(group.flatten(0, 1) for group in x.unflatten(0, shape).unbind(1))
    statistics = one_pass.repeat(num_groups, 1, 1)  # (G, 3, C)
    mean, var = statistics[:, 0, :channels], statistics[:, 1, :channels]
    parts = [
        F.batch_norm(group, mean[g], var[g], weight, bias, training=True, momentum=1.0, eps=eps)
        for g, group in enumerate(groups)
    ]
    if num_views == 1:
        return torch.cat(parts), statistics.mean(0)
    y = torch.stack([part.unflatten(0, (num_views, group_size)) for part in parts], dim=1).flatten(0, 2)
    return y, statistics.mean(0)


def set_groups(model: nn.Module, group_size: int, num_groups: int) -> None:
    """Sets in every part that works by groups, GroupBatchNorm and `Drawing`, that a micro-batch holds `num_groups`
    groups of `group_size` samples."""
    for part in model.modules():
        if isinstance(part, Drawing) or (isinstance(part, GroupBatchNorm) and not part.sync):
            part.group_size, part.num_groups = group_size, num_groups


def group_norms(model: nn.Module) -> list[GroupBatchNorm]:
    """All GroupBatchNorm layers of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, GroupBatchNorm)]


def convert_batch_norms(model: nn.Module) -> None:
    """Converts torch's BatchNorm layers of a model to GroupBatchNorm in place; SyncBatchNorm gets `sync`.

    Only the class of a layer changes. Weights, running statistics, options, names in the state dict, hooks and
    references to the layer stay. The layer still is an instance of its torch class, so a backbone's own `train` finds
    the layers that it keeps frozen.

    A subclass with its own `forward` is not converted (`plain_norms`), unless it is one of `CALLED_AFTER`.

    Raises:
        UsageError: a layer does not know its number of channels yet (LazyBatchNorm).
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, _BatchNorm) or isinstance(layer, GroupBatchNorm) or _has_own_forward(layer):
            continue
        if isinstance(layer, LazyModuleMixin):
            raise UsageError(f"model.{name}: {type(layer).__name__} has no num_features yet; use a layer that has")
        reference = next((t for t in (layer.weight, layer.running_mean) if t is not None), torch.zeros(0))
        is_sync = isinstance(layer, nn.SyncBatchNorm)
        grouped: Any = layer
        kind: Any = type(layer)
        grouped.__class__ = _grouped(kind)
        grouped._begin(is_sync, reference)


def converted_norms(model: nn.Module) -> list[str]:
    """Names of the layers that `convert_batch_norms` has converted."""
    layers = model.named_modules()
    return [name for name, layer in layers if isinstance(layer, GroupBatchNorm) and isinstance(layer, _BatchNorm)]


def plain_norms(model: nn.Module) -> list[str]:
    """Names of the BatchNorm layers that could not be converted. Each normalizes over all samples on its device, and
    updates its running statistics in every forward pass, even in skipped steps."""
    layers = model.named_modules()
    return [name for name, layer in layers if isinstance(layer, _BatchNorm) and not isinstance(layer, GroupBatchNorm)]


@functools.cache
def _grouped(kind: type) -> type:
    """GroupBatchNorm as a subclass of one of torch's classes, or of a subclass of it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = GroupBatchNorm.forward(self, x)
        for name in CALLED_AFTER[_path(kind)]:
            x = getattr(self, name)(x)
        return x

    return type(
        f"Group{kind.__name__}", (GroupBatchNorm, kind), {"forward": forward} if _path(kind) in CALLED_AFTER else {}
    )


def _has_own_forward(layer: _BatchNorm) -> bool:
    kind = type(layer)
    is_known = kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward) or _path(kind) in CALLED_AFTER
    return not is_known or "forward" in vars(layer)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class RunningStatistics:
    """Updates the running statistics of a model's GroupBatchNorm layers, once per applied step.

    The layers' running buffers become views of two tensors, so that an update takes a few kernels for any number of
    layers; each view begins at a multiple of 16 bytes. Create it when the model is on its final device: moving the
    model would separate the buffers again.

    Args:
        model: the model; layers without running statistics are left out.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        self.layers = [layer for layer in group_norms(model) if layer.running_mean is not None]
        if not self.layers:
            return
        widths = [layer.pending.shape[1] for layer in self.layers]
        # The first two rows of all layers' `pending`, side by side.
        self._running = torch.cat([torch.zeros_like(layer.pending[:2]) for layer in self.layers], 1)
        self._tracked = torch.zeros(len(widths), 2, dtype=torch.long, device=self._running.device)  # of 16 bytes each
        for layer, running, tracked in zip(
            self.layers, self._running.split(widths, 1), self._tracked[:, 0], strict=True
        ):
            mean, var = running[:, : layer.num_features]
            for name, view in {"running_mean": mean, "running_var": var, "num_batches_tracked": tracked}.items():
                view.copy_(getattr(layer, name))
                setattr(layer, name, view)

        def by_column(values: list[Any]) -> Tensor:
            columns = [value for value, width in zip(values, widths, strict=True) for _ in range(width)]
            return torch.tensor(columns, device=self._running.device)

        self._layer = by_column(list(range(len(widths))))
        first = [sum(widths[:place]) for place in range(len(widths))]
        self._first = torch.tensor(first, device=self._running.device)
        self._momentum = by_column([layer.momentum or 0.0 for layer in self.layers]).to(self._running.dtype)
        averaged = [layer.momentum is None for layer in self.layers]
        self._is_averaged = by_column(averaged) if any(averaged) else None

    @torch.no_grad()
    def commit(self) -> None:
        """Updates the running statistics with the mean over groups, micro-batches and ranks of this step.

        All ranks call it. Layers without a forward pass since the last call do not change.
        """
        if not self.layers:
            return
        sums = torch.cat([layer.pending for layer in self.layers], 1)
        all_reduce_mean_([sums])
        passes = sums[2]
        has_run = passes > 0
        momentum = self._momentum
        if self._is_averaged is not None:
            momentum = torch.where(self._is_averaged, 1 / (self._tracked[:, 0][self._layer] + 1), momentum)
        self._running.lerp_(sums[:2] / passes.clamp(min=1), momentum * has_run)
        self._tracked[:, 0].add_(has_run[self._first])
        self.discard()

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Forward passes within it do not count: they are repeated."""
        pending = [layer.pending for layer in self.layers]
        before = [tensor.clone() for tensor in pending]
        yield
        if pending:
            torch._foreach_copy_(pending, before)

    @torch.no_grad()
    def discard(self) -> None:
        """Drops the statistics of the forward passes since the last commit, for a skipped step."""
        if self.layers:
            torch._foreach_zero_([layer.pending for layer in self.layers])
