"""Parameter groups by regular expressions on parameter names."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sslrun.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ParamRule:
    """One `[[optimizer.paramwise]]` table: options for the parameters whose name matches.

    Rules apply in order; where several match, the later one wins, option by option.

    Attributes:
        match: regular expression, searched anywhere in the parameter's name ("^" and "$" bind it to the ends).
        lr: learning rate, in place of the optimizer's.
        lr_mult: the optimizer's learning rate times this.
        fix_lr: the schedule leaves the learning rate of these parameters alone (SimSiam's predictor).
        weight_decay: weight decay, in place of the optimizer's.
        weight_decay_mult: the optimizer's weight decay times this.
        momentum: momentum, in place of the optimizer's.
        momentum_mult: the optimizer's momentum times this.
        nesterov: Nesterov's form of the momentum, in place of what the optimizer says.
        betas: decay of the running means, in place of the optimizer's.
        eps: added to the denominator, in place of the optimizer's.
        eps_mult: the optimizer's eps times this.
        eta: LARS's trust coefficient, in place of the optimizer's.
        eta_mult: the optimizer's eta times this.
        lars_exclude: no layer-wise scaling of the learning rate by LARS (biases and norms, mostly).
        freeze_iters: for so many steps from the start neither learning rate nor weight decay (SwAV's prototypes; the
            method gives them no gradient for as long).
    """

    match: str
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
        try:
            re.compile(self.match)
        except re.error as error:
            raise UsageError(f"match = {self.match!r} is no regular expression: {error}") from None
        given = self.given()
        if not given:
            raise UsageError(f"the rule with match = {self.match!r} sets nothing")
        for name, value in given.items():
            if f"{name}_mult" in given:
                raise UsageError(f"match = {self.match!r} sets both {name} and {name}_mult")
            # torch looks at what an optimizer is given for all parameters, not at what a group has.
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(number >= 0 for number in numbers) or (name == "betas" and max(numbers) >= 1):
                raise UsageError(f"match = {self.match!r}: {name} cannot be {value}")

    def given(self) -> dict[str, Any]:
        """The options that the rule sets, as written."""
        return {name: value for name, value in vars(self).items() if name != "match" and value is not None}

    def apply(self, options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        """A group's options after this rule; a `_mult` multiplies the optimizer's own value."""
        applied = dict(options)
        for name, value in self.given().items():
            plain = name.removesuffix("_mult")
            applied[plain] = value if plain == name else defaults[plain] * value
        return applied


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
        UsageError: a rule matches no trained parameter, or sets an option that this optimizer does not have.
    """
    known = {**defaults, "fix_lr": False, "freeze_iters": 0}
    for rule in rules:
        for name in rule.given():
            if name.removesuffix("_mult") not in known:
                raise UsageError(
                    f"optimizer.paramwise: match = {rule.match!r} sets {name}, which {owner} does not have"
                )
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    for rule in rules:
        if not any(re.search(rule.match, name) for name, _ in trained):
            raise UsageError(
                f"optimizer.paramwise: match = {rule.match!r} is found in the name of no trained parameter; "
                f"nearest: {', '.join(_nearest(rule.match, [name for name, _ in trained]))}"
            )
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in trained:
        options = known
        for rule in rules:
            if re.search(rule.match, name):
                options = rule.apply(options, known)
        group = groups.setdefault(tuple(options.values()), {"params": [], **options, "initial_lr": options["lr"]})
        group["params"].append((name, parameter))
    return list(groups.values())


def _nearest(pattern: str, names: list[str]) -> list[str]:
    """The three names that have most of the pattern's letters, in order."""
    letters = re.sub(r"\\(.)|[\^$*+?()\[\]{}|]", r"\1", pattern)

    def shared(name: str) -> int:
        blocks = difflib.SequenceMatcher(None, letters, name, autojunk=False).get_matching_blocks()
        return sum(block.size**2 for block in blocks)  # long pieces count for more than scattered letters

    return sorted(names, key=lambda name: (-shared(name), len(name)))[:3]
