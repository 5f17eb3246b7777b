"""A forward pass of a recipe's model on fake tensors: measures its activations and finds parts that do not fit."""

import copy
import logging
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)

import sslkernels
from sslrun.config.component import Component
from sslrun.contract import Backbone, Batch, Method, Progress
from sslrun.errors import UsageError
from sslrun.nn.norm import set_groups
from sslrun.recipe import Recipe
from sslrun.runtime import distributed

START = Progress(step=0, total_steps=1, steps_per_epoch=1, seed=0)


def activation_bytes(recipe: Recipe, precision: str) -> int:
    """Bytes that the forward pass of one BatchNorm group keeps for the backward pass, counted without computing.

    Raises:
        UsageError: the parts of the model do not fit together.
    """
    group = recipe.data.samples_per_gpu
    kept: dict[int, Tensor] = {}  # by storage, so that views of one storage count once
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True  # it also prints the errors that it raises

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with distributed.alone(), FakeTensorMode(allow_non_fake_inputs=True) as shapes_only:
        with FakeCopyMode(shapes_only):
            method = copy.deepcopy(recipe.model).train()
        set_groups(method, group, 1)
        views = [torch.empty(view.num_views * group, 3, *view.size) for view in recipe.data.views]
        batch = Batch(views, torch.empty(group, dtype=torch.long), torch.empty(group, dtype=torch.long))
        trail = _Trail(method)
        try:
            (target,) = method.targets([batch], START)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                method(batch, START, target)
        except Exception as error:
            if isinstance(error, RuntimeError | ValueError) or _users_line(error) is None:
                raise UsageError(trail.explain(error)) from error
            raise
    in_float32 = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return in_float32 // (2 if precision == "bf16" else 1)


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
        for module in names:
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)

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

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, Backbone):
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
    file, number = next(line for line in reversed(lines) if library not in line[0].parents)
    return None if own & {*file.parents} else f"{file.name}:{number}"
