"""An optimizer step of a recipe on fake tensors: counts its memory and finds parts of the model that do not fit."""

import contextlib
import logging
import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from traceback import walk_tb
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sslkernels
from sslrun.config.component import Component
from sslrun.contract import Backbone, Batch, Method, PatchMask, Progress
from sslrun.data.masks import blocks_of, masks_of
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError
from sslrun.nn.norm import set_groups
from sslrun.nn.without_values import without_values
from sslrun.recipe import Recipe
from sslrun.runtime import distributed

START = Progress(step=0, total_steps=1, steps_per_epoch=1, seed=0)


@dataclass(frozen=True)
class StepMemory:
    """Bytes that an optimizer step holds on its device.

    Attributes:
        weights: parameters and buffers, and the copies of parameters that autocast makes.
        gradients: one for each trained parameter.
        optimizer: the optimizer's state.
        images: views of the samples of one BatchNorm group.
        activations: of one BatchNorm group, at the moment of forward or backward pass when there are most.
    """

    weights: int
    gradients: int
    optimizer: int
    images: int
    activations: int

    @property
    def fixed(self) -> int:
        """What does not depend on the batch."""
        return self.weights + self.gradients + self.optimizer

    def total(self, groups: int, groups_at_once: int) -> int:
        """Bytes with `groups` groups in a step, of which `groups_at_once` make a micro-batch. The images of the whole
        step are there from its beginning."""
        return self.fixed + groups * self.images + groups_at_once * self.activations


def rehearse(
    recipe: Recipe,
    precision: str,
    images: torch.dtype = torch.float32,
    groups: int = 1,
    watch: AbstractContextManager[Any] | None = None,
    is_alone: bool = True,
) -> StepMemory:
    """The memory of an optimizer step, counted without computing: on fake tensors, in one micro-batch.

    Counted is what the framework allocates in eager execution; not what the libraries need for themselves (convolution
    workspaces, the loader's queue), nor what `torch.compile` saves.

    Args:
        recipe: a recipe.
        precision: "fp32", "bf16" or "fp64".
        images: dtype of the views that the loader delivers.
        groups: number of BatchNorm groups of the micro-batch; `images` and `activations` are those of all of them.
        watch: entered while the step runs; a dispatch mode sees its operators.
        is_alone: whether it is the step of a run of one process, even if this process is one of several.

    Raises:
        UsageError: the parts of the model do not fit together.
    """
    group = recipe.data.samples_per_gpu
    samples = groups * group
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True  # it also prints the errors that it raises
    shapes_only = FakeTensorMode(allow_non_fake_inputs=True)
    is_exact = precision == "fp64"
    method = without_values(recipe.model, shapes_only, torch.float64 if is_exact else None).train()
    images = torch.float64 if is_exact else images
    with distributed.alone() if is_alone else contextlib.nullcontext(), shapes_only:
        set_groups(method, group, groups)
        optimizer = recipe.optimizer.create(method.named_parameters(), method.backbone)
        views = [
            torch.empty(view.num_views * samples, *view.size, view.channels, dtype=images).permute(0, 3, 1, 2)
            for view in recipe.data.views
        ]
        masks = masks_like(recipe.data.views, samples)
        batch = Batch(views, torch.empty(samples, dtype=torch.long), torch.empty(samples, dtype=torch.long), masks)
        trail = _Trail(method)
        live = _Live([*method.parameters(), *method.buffers()], views)
        with live, watch or contextlib.nullcontext():
            try:
                with torch.no_grad(), _autocast(precision):
                    (target,) = method.targets([batch], START)
                with _autocast(precision):
                    loss = method(batch, START, target)
            except Exception as error:
                if isinstance(error, RuntimeError | ValueError | AssertionError) or _users_line(error) is None:
                    raise UsageError(trail.explain(error)) from error
                raise
            trail.end()
            # A user's own backward pass or optimizer may need numbers. Then what was counted so far has to do.
            with contextlib.suppress(RuntimeError):
                loss.value.backward()
            live.is_counting = False
            _step(optimizer)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return StepMemory(
        weights=_bytes([*method.parameters(), *method.buffers()]) + live.peak_copies,
        gradients=_bytes(trained),
        optimizer=_bytes(state),
        images=_bytes(views),
        activations=live.peak_activations,
    )


def masks_like(views: Sequence[ViewGroup], samples: int, device: torch.device | str = "cpu") -> list[PatchMask | None]:
    """Masks of the shapes of a batch, with the numbers of hidden patches of the first samples of an epoch."""
    masks: list[PatchMask | None] = []
    first = (0, 0, np.arange(samples))
    for mask, blocks in zip(masks_of(views, *first), blocks_of(views, *first), strict=True):
        if mask is None:
            masks.append(None)
        else:
            hidden = torch.empty(len(mask), mask[0].size, dtype=torch.bool, device=device)
            targets = None if blocks is None else torch.zeros(blocks.shape, dtype=torch.long, device=device)
            masks.append(PatchMask(hidden, int(mask.sum()), targets))
    return masks


def _autocast(precision: str) -> torch.autocast:
    """As the executor's, but on the CPU. When it ends, the copies of parameters that it made are freed."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def _step(optimizer: torch.optim.Optimizer) -> None:
    """A first step, which makes the optimizer's state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:  # the loss does not use it; the executor gives it zeros
                parameter.grad = torch.zeros_like(parameter)
    with contextlib.suppress(RuntimeError):
        optimizer.step()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


class _Live(TorchDispatchMode):
    """Counts the memory that operators allocate and free, without that of parameters, images and gradients.

    Args:
        parameters: parameters and buffers.
        images: the batch.

    Attributes:
        peak_activations: largest number of bytes at once.
        peak_copies: the same for copies of parameters in another dtype, which do not count as activations.
        is_counting: whether the peaks are being updated.
    """

    def __init__(self, parameters: Sequence[Tensor], images: Sequence[Tensor]) -> None:
        super().__init__()
        self.peak_activations, self.peak_copies, self.is_counting = 0, 0, True
        self._now = {_Kind.ACTIVATION: 0, _Kind.COPY: 0, _Kind.OTHER: 0}
        self._held: dict[int, tuple[_Kind, int]] = {}  # kind and bytes of a storage
        self._parameters = {tensor.untyped_storage()._cdata for tensor in parameters}
        for tensor in (*parameters, *images):
            self._hold(tensor, _Kind.OTHER)
        for tensor in parameters:
            if tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(self._let_go_of_gradient)  # type: ignore[attr-defined]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("aten::_fused_"):  # updates in place, which have no fake form
            return None
        result = func(*args, **(kwargs or {}))
        if self.is_counting:
            is_copy = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._parameters
            for output in tree_leaves(result):
                if isinstance(output, Tensor):
                    self._hold(output, _Kind.COPY if is_copy else _Kind.ACTIVATION)
            self.peak_activations = max(self.peak_activations, self._now[_Kind.ACTIVATION])
            self.peak_copies = max(self.peak_copies, self._now[_Kind.COPY])
        return result

    def _hold(self, tensor: Tensor, kind: "_Kind") -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held:
            self._held[key] = kind, storage.nbytes()
            self._now[kind] += storage.nbytes()
            weakref.finalize(storage, self._let_go, key).atexit = False

    def _let_go(self, key: int) -> None:
        kind, size = self._held.pop(key)
        self._now[kind] -= size

    def _let_go_of_gradient(self, parameter: Tensor) -> None:
        """A gradient is complete: it no longer is a temporary of the backward pass."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        kind, size = self._held.get(key, (_Kind.OTHER, 0))
        if kind == _Kind.ACTIVATION:
            self._held[key] = _Kind.OTHER, size
            self._now[kind] -= size
            self._now[_Kind.OTHER] += size


class _Kind(Enum):
    """What a storage is counted as."""

    ACTIVATION = auto()
    COPY = auto()
    OTHER = auto()


class _Trail:
    """Records which modules of a method the forward pass has entered, so that an error names them.

    Args:
        method: a copy of the method, for one forward pass.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.entered: list[tuple[nn.Module, list[Tensor]]] = []  # outermost first, each with its inputs
        self.num_maps = 1
        students = {teacher: student for teacher, student, _ in method.teachers(START)}
        names = {module: name for name, module in method.named_modules()}
        self.keys = {module: f"model.{names[students.get(module, module)]}".rstrip(".") for module in names}
        self.hooks = [module.register_forward_pre_hook(self._enter) for module in names]
        self.hooks += [module.register_forward_hook(self._leave, with_kwargs=True) for module in names]

    def end(self) -> None:
        """Stops recording. Where activations are recomputed, the backward pass enters modules that it never leaves."""
        for hook in self.hooks:
            hook.remove()

    def explain(self, error: Exception) -> str:
        """One line about what does not fit, which begins with the key of a component."""
        components = [(module, inputs) for module, inputs in self.entered if isinstance(module, Component)]
        component, inputs = components[-1] if components else (self.method, [])
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UsageError) and message.startswith("model."):
            return message
        message += f" ({line})" if (line := _users_line(error)) else ""
        name = f"{self.keys[component]}: {type(component).__name__}"
        if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
            return f"{name} needs a value of a tensor on the host, and a step would wait for the device: {message}"
        layer, given = self.entered[-1] if self.entered else (self.method, [])
        wanted, channels = _wanted_channels(layer), [_channels(tensor) for tensor in inputs]
        if wanted is not None and given and channels and _channels(given[0]) == channels[0] != wanted:
            shape = f"(B, {', '.join(map(str, inputs[0].shape[1:]))})"
            return f"{name} takes {wanted} channels (in_channels), but is given {channels[0]}: {shape}{self._maps()}"
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in inputs) or "these views"
        return f"{name} cannot take {shapes}{self._maps()}: {message}"

    def _maps(self) -> str:
        many = self.num_maps > 1
        return f"; of the {self.num_maps} feature maps of the backbone (out_indices) the last is used" if many else ""

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.entered.append((module, [value for value in inputs if isinstance(value, Tensor)]))

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        if (
            isinstance(module, Backbone) and not options
        ):  # with options, its result is its own and the method's business
            self._check_maps(module, output)
        self.entered.pop()

    def _check_maps(self, backbone: Backbone, output: Any) -> None:
        """Raises UsageError if the output is not what `Backbone` promises."""
        name = f"{self.keys[backbone]}: {type(backbone).__name__}"
        if not isinstance(output, list | tuple) or not output or not all(isinstance(each, Tensor) for each in output):
            kind = "one tensor" if isinstance(output, Tensor) else type(output).__name__
            raise UsageError(f"{name} returns {kind}, expected a list of feature maps")
        last = output[-1]
        if last.dim() not in (2, 4):
            raise UsageError(f"{name} returns {tuple(last.shape)}, expected (B, C, H, W) or (B, C)")
        if last.shape[1] != backbone.num_features:
            raise UsageError(
                f"{name} returns {last.shape[1]} channels, but its num_features is {backbone.num_features}"
            )
        self.num_maps = len(output)


def _wanted_channels(layer: nn.Module) -> int | None:
    """Input channels of a linear or convolutional layer; None for other layers."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    return layer.in_channels if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None


def _channels(tensor: Tensor) -> int | None:
    return tensor.shape[1] if tensor.dim() > 1 else None


def _users_line(error: Exception) -> str | None:
    """`file:line` of an error in a user's own code; None if it was raised in this package."""
    library, own = Path(torch.__file__).parent, {Path(each).parent for each in (__file__, sslkernels.__file__)}
    lines = [(Path(frame.f_code.co_filename), number) for frame, number in walk_tb(error.__traceback__)]
    is_torchs_or_ours = {library, Path(__file__)}  # our dispatch mode is called by torch
    file, number = next(line for line in reversed(lines) if not is_torchs_or_ours & {line[0], *line[0].parents})
    return None if own & {*file.parents} else f"{file.name}:{number}"
