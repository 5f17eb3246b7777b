"""Divides parameters into groups by their names and kinds."""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sslrun.errors import UsageError
from sslrun.scheduled import Number, extremes, plain, product

Kind = Literal["norm", "bias", "embedding"]

_CHOICE = ("match", "kind")
_LENGTHS = {"freeze_iters": "freeze_epochs", "ramp_iters": "ramp_epochs"}  # one length in two units
_OTHER_UNIT = _LENGTHS | {epochs: iters for iters, epochs in _LENGTHS.items()}
_OF_TIME = {"fix_lr": False, **dict.fromkeys(_OTHER_UNIT, 0)}  # what every optimizer's groups have


@dataclass(frozen=True, kw_only=True)
class ParamRule:
    """One `[[optimizer.paramwise]]` table: options for the parameters that `match` or `kind` selects.

    A rule with both applies to parameters that match and are of one of the kinds. Rules apply in order; if several
    select a parameter, later ones win, option by option.

    Attributes:
        match: regular expression, searched anywhere in a parameter's name; "^" and "$" stand for the ends of the name.
        kind: kinds of parameters: "norm" for scale and shift of normalization layers, "bias" for every bias, including
            the shift of norms, "embedding" for class and mask tokens and positional embeddings.
        lr: learning rate of these parameters, instead of the optimizer's.
        lr_mult: factor of the optimizer's learning rate, or a schedule of it.
        fix_lr: whether the schedule leaves the learning rate of these parameters constant (SimSiam's predictor).
        weight_decay: weight decay of these parameters, or a schedule of it, instead of the optimizer's.
        weight_decay_mult: factor of the optimizer's weight decay, or a schedule of it.
        momentum: momentum of these parameters, instead of the optimizer's.
        momentum_mult: factor of the optimizer's momentum.
        nesterov: whether these parameters use Nesterov momentum, instead of the optimizer's setting.
        betas: decays of the running means of the gradient and of its square, instead of the optimizer's.
        eps: number added to the denominator, instead of the optimizer's.
        eps_mult: factor of the optimizer's eps.
        eta: LARS's trust coefficient for these parameters, instead of the optimizer's.
        eta_mult: factor of the optimizer's eta.
        lars_exclude: whether LARS does not scale the learning rate of these parameters (usually biases and norms).
        freeze_iters: steps at the start of the run with a learning rate and weight decay of 0 (SwAV's prototypes). The
            gradients are computed all the same, and the optimizer's running means see them.
        freeze_epochs: length of that time in epochs, instead of `freeze_iters`.
        ramp_iters: steps after it in which the learning rate rises linearly from 0 to what the schedule gives.
        ramp_epochs: length of the rise in epochs, instead of `ramp_iters`.
    """

    match: str | None = None
    kind: list[Kind] | None = None
    lr: float | None = None
    lr_mult: Number | None = None
    fix_lr: bool | None = None
    weight_decay: Number | None = None
    weight_decay_mult: Number | None = None
    momentum: float | None = None
    momentum_mult: float | None = None
    nesterov: bool | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    eps_mult: float | None = None
    eta: float | None = None
    eta_mult: float | None = None
    lars_exclude: bool | None = None
    freeze_iters: int | None = None
    freeze_epochs: float | None = None
    ramp_iters: int | None = None
    ramp_epochs: float | None = None

    def __post_init__(self) -> None:
        if self.match is None and not self.kind:
            raise UsageError('a rule of optimizer.paramwise needs match or kind, such as kind = ["norm", "bias"]')
        try:
            re.compile(self.match or "")
        except re.error as error:
            raise UsageError(f"match = {self.match!r} is no regular expression: {error}") from None
        given = self.given()
        if not given:
            raise UsageError(f"the rule with {self} sets nothing")
        for name, value in given.items():
            for other in (f"{name}_mult", _LENGTHS.get(name)):
                if other in given:
                    raise UsageError(f"{self} sets both {name} and {other}")
            # torch checks an optimizer's defaults, but not the options of a group.
            numbers = value if isinstance(value, tuple) else extremes(value)
            if not all(number >= 0 for number in numbers) or (name == "betas" and max(numbers) >= 1):
                raise UsageError(f"{self}: {name} cannot be {value}")

    def __str__(self) -> str:
        """The rule's `match` and `kind`, for messages."""
        kind = [] if self.kind is None else [f"kind = {json.dumps(self.kind)}"]
        return ", ".join(kind if self.match is None else [*kind, f"match = {self.match!r}"])

    def given(self) -> dict[str, Any]:
        """The options that the rule sets, by their names in the recipe."""
        return {name: value for name, value in vars(self).items() if name not in _CHOICE and value is not None}

    def selects(self, name: str, kinds: set[str]) -> bool:
        """Whether the rule applies to a parameter with this name and these kinds."""
        is_of_kind = self.kind is None or not kinds.isdisjoint(self.kind)
        return is_of_kind and (self.match is None or re.search(self.match, name) is not None)

    def apply(self, options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        """A group's options after this rule; a `_mult` multiplies the optimizer's own value."""
        applied = dict(options)
        for name, value in self.given().items():
            option = name.removesuffix("_mult")
            applied[option] = value if option == name else product(defaults[option], value)
            if option in _OTHER_UNIT:
                applied[_OTHER_UNIT[option]] = 0
        return applied


def kinds_of(named_parameters: list[tuple[str, nn.Parameter]]) -> dict[str, set[str]]:
    """The kinds of each parameter, by name.

    Norms are recognized by shape: a `weight` of one dimension is a scale, and the `bias` beside it a shift. Linear
    layers, convolutions and embeddings have weights of two dimensions or more.
    """
    scales = {name.rpartition(".")[0] for name, p in named_parameters if _last(name) == "weight" and p.ndim <= 1}
    return {
        name: {
            *(["norm"] if _last(name) in ("weight", "bias") and name.rpartition(".")[0] in scales else []),
            *(["bias"] if _last(name) == "bias" else []),
            *(["embedding"] if re.search(r"(_token|pos_embed|position_embedding)s?$", name) else []),
        }
        for name, _ in named_parameters
    }


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    defaults: dict[str, Any],
    rules: list[ParamRule],
    owner: str,
    lr_factor: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Groups of a torch optimizer: each has the parameters with equal options, with their names.

    Only parameters that require a gradient are included. Groups and their parameters are in the order of the model.
    Besides every option, a group has `fix_lr`, the lengths of its freeze and ramp, and what changes over a run as the
    recipe says it: `initial_lr` (the base of the schedule) and `initial_weight_decay`.

    Args:
        named_parameters: names and parameters, as from `module.named_parameters()`.
        defaults: the optimizer's options, among them `lr`.
        rules: the recipe's `optimizer.paramwise`.
        owner: the optimizer's name, for messages.
        lr_factor: factor of the learning rate of a parameter, by its name, after all rules.

    Raises:
        UsageError: a rule selects no trained parameter, or sets an option that this optimizer does not have.
    """
    known = {**defaults, **_OF_TIME}
    for rule in rules:
        for name in rule.given():
            if name.removesuffix("_mult") not in known:
                raise UsageError(f"optimizer.paramwise: {rule} sets {name}, which {owner} does not have")
    parameters = list(named_parameters)
    kinds = kinds_of(parameters)
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    for rule in rules:
        if not any(rule.selects(name, kinds[name]) for name, _ in trained):
            raise UsageError(f"optimizer.paramwise: {rule} {_selects_nothing(rule, [name for name, _ in trained])}")
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in trained:
        options = known
        for rule in rules:
            if rule.selects(name, kinds[name]):
                options = rule.apply(options, known)
        factor = lr_factor(name)
        if factor != 1:
            options = {**options, "lr": product(options["lr"], factor)}
        initial = {f"initial_{key}": options[key] for key in ("lr", "weight_decay") if key in options}
        numbers = {key: plain(value) for key, value in options.items()}
        group = groups.setdefault(tuple(options.values()), {"params": [], **numbers, **initial})
        group["params"].append((name, parameter))
    return list(groups.values())


def layer_decay(layers: Sequence[Sequence[str]], decay: float) -> Callable[[str], float]:
    """The learning-rate factor of a parameter by its name (Clark et al. 2020, arXiv 2003.10555; Bao et al. 2022, arXiv
    2106.08254): the backbone's last layer has decay, the one below decay squared, ...; anything else has 1.

    Args:
        layers: names of parts of the backbone, from `Backbone.layers`.
        decay: ratio of a layer's rate to that of the layer above it.
    """
    patterns = [re.compile(rf"backbone\.({'|'.join(map(re.escape, names))})(\.|$)") for names in layers]

    def factor(name: str) -> float:
        depths = (number for number, pattern in enumerate(patterns) if pattern.match(name))
        return decay ** (len(layers) - next(depths, len(layers)))

    return factor


def _selects_nothing(rule: ParamRule, names: list[str]) -> str:
    """The end of the message about a rule that selects no parameter."""
    if rule.match is None:
        return "selects no trained parameter"
    found = "matches the name of no trained parameter" + (" of that kind" if rule.kind else "")
    return f"{found}; nearest: {', '.join(_nearest(rule.match, names))}"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _nearest(pattern: str, names: list[str]) -> list[str]:
    """The three names most similar to the pattern, most similar first."""
    letters = re.sub(r"\\(.)|[\^$*+?()\[\]{}|]", r"\1", pattern)

    def shared(name: str) -> int:
        blocks = difflib.SequenceMatcher(None, letters, name, autojunk=False).get_matching_blocks()
        return sum(block.size**2 for block in blocks)  # long common pieces count more than scattered letters

    return sorted(names, key=lambda name: (-shared(name), len(name)))[:3]
