"""The optimizers of the `[optimizer]` table: torch's and LARS."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from sslrun.config.component import Component
from sslrun.contract import Backbone
from sslrun.errors import UsageError
from sslrun.optim import lars
from sslrun.optim.groups import ParamRule, layer_decay, parameter_groups
from sslrun.scheduled import Number, extremes, plain


@dataclass(frozen=True, kw_only=True)
class GradClip:
    """The `[optimizer.grad_clip]` table: limits the norm of the gradient, as torch's `clip_grad_norm_`.

    A step with a norm that is not finite is skipped before it changes the weights.

    Attributes:
        max_norm: largest norm of a scope's gradient, above 0; a larger gradient is scaled down to it.
        norm_type: order of the norm, above 0: 2 is the Euclidean norm, "inf" the largest absolute value.
        scope: which gradients are measured and scaled together: "global", those of all parameters; "module", those of
            each part of the model (DINOv2); "parameter", each alone (DINO). The norm in the log is that of all of them.
        modules: with scope = "module", regular expressions for the beginning of parameters' names, one for each part; a
            parameter belongs to the first that matches, and those that none matches are a part. By default the parts
            are the direct submodules of the model, such as backbone, neck and head.
    """

    max_norm: float
    norm_type: float | Literal["inf"] = 2.0
    scope: Literal["global", "module", "parameter"] = "global"
    modules: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("max_norm", "norm_type"):
            if not float(getattr(self, name)) > 0:
                raise UsageError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.modules is not None and self.scope != "module":
            raise UsageError('grad_clip.modules does nothing without scope = "module"')
        for pattern in self.modules or []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"grad_clip.modules: {pattern!r} is no regular expression: {error}") from None

    def parts(self, names: Iterable[str]) -> list[list[str]]:
        """The names of parameters, divided into those that are clipped together; the order is kept within a part.

        Raises:
            UsageError: a regular expression matches the name of no parameter.
        """
        names = list(names)
        if self.scope == "global":
            return [names]
        if self.scope == "parameter":
            return [[name] for name in names]
        parts: dict[str, list[str]] = {pattern: [] for pattern in self.modules or []}
        for name in names:
            own = name.partition(".")[0] if self.modules is None else ""
            parts.setdefault(next((p for p in self.modules or [] if re.match(p, name)), own), []).append(name)
        for pattern, part in parts.items():
            if not part:
                raise UsageError(f"grad_clip.modules: {pattern!r} matches the name of no trained parameter")
        return list(parts.values())


_OF_ALL_GROUPS = ("paramwise", "layer_decay", "grad_clip")  # what is not a hyper-parameter of a parameter group


@dataclass(frozen=True, kw_only=True)
class Optimizer(Component, kind="optimizers"):
    """An update rule with its hyper-parameters.

    Args:
        lr: base learning rate, which the schedule changes during the run.
        weight_decay: coefficient of the weight decay, or a schedule of it.
        paramwise: rules that set other options for some parameters, selected by name or kind.
        layer_decay: ratio of the learning rate of a layer of the backbone to that of the layer above it; the last layer
            has this factor of the rate of necks and heads. 1 for equal rates. It multiplies what paramwise sets.
        grad_clip: limit on the norm of the gradient; none by default.
    """

    lr: float
    weight_decay: Number = 0.0
    paramwise: list[ParamRule] = field(default_factory=list)
    layer_decay: float = 1.0
    grad_clip: GradClip | None = None

    fusible: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            for number in extremes(getattr(self, name)):
                if not number >= 0:
                    raise UsageError(f"{name} cannot be {number}")
        if not 0 < self.layer_decay <= 1:
            raise UsageError(f"layer_decay must be above 0 and at most 1, not {self.layer_decay}")

    def options(self) -> dict[str, Any]:
        """The hyper-parameters of a parameter group."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OF_ALL_GROUPS}

    def defaults(self) -> dict[str, Any]:
        """The hyper-parameters that torch's constructor takes, as plain numbers."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name not in _OF_ALL_GROUPS}

    def create(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], backbone: Backbone | None = None
    ) -> torch.optim.Optimizer:
        """The torch optimizer of the parameters that require a gradient; its groups carry `param_names`.

        Args:
            named_parameters: names and parameters of a method.
            backbone: the method's backbone, whose layers `layer_decay` counts; needed for that alone.

        Raises:
            UsageError: a hyper-parameter or a rule of `paramwise` is wrong, or no parameter requires a gradient.
        """
        assert backbone is not None or self.layer_decay == 1, "layer_decay needs the backbone"
        layers = [] if backbone is None or self.layer_decay == 1 else backbone.layers()
        factor = layer_decay(layers, self.layer_decay)
        groups = parameter_groups(named_parameters, self.options(), self.paramwise, type(self).__name__, factor)
        if not groups:
            raise UsageError("no parameter of the model requires a gradient: there is nothing to train")
        devices = {parameter.device.type for group in groups for _, parameter in group["params"]}
        fused = {"fused": True} if self.fusible and devices <= {"cpu", "cuda"} else {}
        try:
            return self.build(groups, **fused)
        except ValueError as error:
            raise UsageError(f"optimizer: {error}") from error

    def build(self, groups: list[dict[str, Any]], **kwargs: Any) -> torch.optim.Optimizer:
        """The torch optimizer of groups in which every option is set."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum (torch.optim.SGD).

    Args:
        momentum: decay of the running sum of gradients, 0 to 1.
        nesterov: whether to use Nesterov momentum.
    """

    momentum: float = 0.0
    nesterov: bool = False

    def build(self, groups: list[dict[str, Any]], **kwargs: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, **self.defaults(), **kwargs)


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101; torch.optim.AdamW).

    Args:
        betas: decays of the running means of the gradient and of its square, 0 to below 1.
        eps: number added to the denominator for numerical stability.
    """

    weight_decay: Number = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def build(self, groups: list[dict[str, Any]], **kwargs: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, **self.defaults(), **kwargs)


@dataclass(frozen=True, kw_only=True)
class LARS(Optimizer):
    """SGD with momentum and a learning rate scaled for each parameter (You et al. 2017, arXiv 1708.03888).

    Args:
        momentum: decay of the running sum of updates, 0 to 1.
        eta: trust coefficient: ratio of an update's norm to the parameter's norm at a learning rate of 1.
        eps: number added to the denominator of the trust ratio.
    """

    momentum: float = 0.0
    eta: float = 0.001
    eps: float = 1e-8

    fusible: ClassVar[bool] = False

    def options(self) -> dict[str, Any]:
        return {**super().options(), "lars_exclude": False}

    def build(self, groups: list[dict[str, Any]], **kwargs: Any) -> torch.optim.Optimizer:
        return lars.LARS(groups, **self.defaults(), **kwargs)
