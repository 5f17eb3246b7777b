"""Parameter groups by the names and kinds of parameters."""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sslrun.errors import UsageError

Kind = Literal["norm", "bias", "embedding"]

_CHOICE = ("match", "kind")


@dataclass(frozen=True, kw_only=True)
class ParamRule:
    """One `[[optimizer.paramwise]]` table: options for the parameters that `match` or `kind` selects.

    A rule has one of the two, or both: then it applies to parameters that are of one of the kinds and match. Rules
    apply in order; where several select a parameter, the later one wins, option by option.

    Attributes:
        match: regular expression, searched anywhere in the parameter's name ("^" and "$" bind it to the ends).
        kind: kinds of parameters: "norm" for scale and shift of normalization layers, "bias" for every bias, that of
            norms included, "embedding" for class and mask tokens and positional embeddings.
        lr: learning rate, in place of the optimizer's.
        lr_mult: the optimizer's learning rate times this.
        fix_lr: the schedule leaves the learning rate of these parameters alone (SimSiam's predictor).
        weight_decay: weight decay, in place of the optimizer's.
        weight_decay_mult: the optimizer's weight decay times this.
        momentum: momentum, in place of the optimizer's.
        momentum_mult: the optimizer's momentum times this.
        nesterov: whether momentum is Nesterov's, in place of what the optimizer says.
        betas: decay of the running means of the gradient and of its square, in place of the optimizer's.
        eps: number added to the denominator, in place of the optimizer's.
        eps_mult: the optimizer's eps times this.
        eta: LARS's trust coefficient, in place of the optimizer's.
        eta_mult: the optimizer's eta times this.
        lars_exclude: whether LARS leaves the learning rate of these parameters unscaled (biases and norms, mostly).
        freeze_iters: number of steps from the start with neither learning rate nor weight decay (SwAV's prototypes,
            which the method gives no gradient for as long).
    """

    match: str | None = None
    kind: list[Kind] | None = None
    lr: float | None = None
    lr_mult: float | None = None
    fix_lr: bool | None = None
    weight_decay: float | None = None
    weight_decay_mult: float | None = None
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
            if f"{name}_mult" in given:
                raise UsageError(f"{self} sets both {name} and {name}_mult")
            # torch looks at what an optimizer is given for all parameters, not at what a group has.
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(number >= 0 for number in numbers) or (name == "betas" and max(numbers) >= 1):
                raise UsageError(f"{self}: {name} cannot be {value}")

    def __str__(self) -> str:
        """What selects the parameters, for messages."""
        kind = [] if self.kind is None else [f"kind = {json.dumps(self.kind)}"]
        return ", ".join(kind if self.match is None else [*kind, f"match = {self.match!r}"])

    def given(self) -> dict[str, Any]:
        """The options that the rule sets, as written."""
        return {name: value for name, value in vars(self).items() if name not in _CHOICE and value is not None}

    def selects(self, name: str, kinds: set[str]) -> bool:
        """Whether the rule is for a parameter of this name and these kinds."""
        is_of_kind = self.kind is None or not kinds.isdisjoint(self.kind)
        return is_of_kind and (self.match is None or re.search(self.match, name) is not None)

    def apply(self, options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        """A group's options after this rule; a `_mult` multiplies the optimizer's own value."""
        applied = dict(options)
        for name, value in self.given().items():
            plain = name.removesuffix("_mult")
            applied[plain] = value if plain == name else defaults[plain] * value
        return applied


def kinds_of(named_parameters: list[tuple[str, nn.Parameter]]) -> dict[str, set[str]]:
    """The kinds of each parameter, by name.

    A norm is told by its shape: a `weight` of one dimension is a scale, and the `bias` beside it a shift. Linear
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
    named_parameters: Iterable[tuple[str, nn.Parameter]], defaults: dict[str, Any], rules: list[ParamRule], owner: str
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: parameters with equal options together, with their names.

    Only parameters that require a gradient. Groups and the parameters in them keep the order of the model. Each group
    has, besides every option, `initial_lr` (what a schedule starts from), `fix_lr` and `freeze_iters`.

    Args:
        named_parameters: as `module.named_parameters()` gives them.
        defaults: the optimizer's options, one value each; `lr` among them.
        rules: the recipe's `optimizer.paramwise`.
        owner: the optimizer's name, for messages.

    Raises:
        UsageError: a rule selects no trained parameter, or sets an option that this optimizer does not have.
    """
    known = {**defaults, "fix_lr": False, "freeze_iters": 0}
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
        group = groups.setdefault(tuple(options.values()), {"params": [], **options, "initial_lr": options["lr"]})
        group["params"].append((name, parameter))
    return list(groups.values())


def _selects_nothing(rule: ParamRule, names: list[str]) -> str:
    """What is wrong with a rule that no parameter is selected by."""
    if rule.match is None:
        return "is the kind of no trained parameter"
    found = "is found in the name of no trained parameter" + (" of that kind" if rule.kind else "")
    return f"{found}; nearest: {', '.join(_nearest(rule.match, names))}"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _nearest(pattern: str, names: list[str]) -> list[str]:
    """The three names that have most of the pattern's letters, in order."""
    letters = re.sub(r"\\(.)|[\^$*+?()\[\]{}|]", r"\1", pattern)

    def shared(name: str) -> int:
        blocks = difflib.SequenceMatcher(None, letters, name, autojunk=False).get_matching_blocks()
        return sum(block.size**2 for block in blocks)  # long pieces count for more than scattered letters

    return sorted(names, key=lambda name: (-shared(name), len(name)))[:3]
