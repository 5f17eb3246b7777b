"""Converts the optimizer, its rules for some parameters, and gradient clipping."""

import math
import re
from typing import Any, NamedTuple

from sslrun.config.dump import escape
from sslrun.config.node import Key, Node, Origin, plain
from sslrun.config.schema_reader import committed_schema
from sslrun.importer.old import Effect, OldTable, node
from sslrun.importer.ours import Part, component, is_class, known
from sslrun.importer.parameters import Parameter, is_simple, pattern_of

MAX_RULES = 200
_OF_ALL = ("fix_lr", "freeze_iters")  # options of parameters that are none of an optimizer's own
_KINDS = (["norm", "bias"], ["norm"], ["bias"], ["norm", "bias", "embedding"])  # those that rules are tried to be
_NO_OPTION = "[[optimizer.paramwise]] has nothing like it"


class Rule(NamedTuple):
    """One old rule: options for some parameters.

    Attributes:
        pattern: the old pattern, as a regular expression.
        chosen: our names of the parameters that it means; None where they are not known.
        options: in our words.
        where: the place of the old rule.
        key: its key there.
    """

    pattern: str
    chosen: set[str] | None
    options: dict[str, Node]
    where: Origin
    key: Key


def optimizer(old: OldTable, made: Part) -> Node | None:
    """Converts the optimizer; `made` are the keys that were converted elsewhere."""
    name = old.type()
    if not is_class("optimizers", name):
        old.give_up(f"there is no optimizer {name or 'without a type'} here")
        return None
    old.expect(f"{name} has no such variant here", dampening=0, amsgrad=False, maximize=False, foreach=None)
    if name == "LARS":
        old.expect("LARS has no Nesterov momentum here", nesterov=False)
    old.lose("layer-wise rates and the like are [[optimizer.paramwise]], rule by rule", "constructor")
    return component(old, "optimizers", name, made)


def clipping(grad_clip: OldTable | None) -> Part:
    """Converts the limit on the norm of all gradients together."""
    if grad_clip is None:
        return {}
    grad_clip.expect("gradients are clipped by their norm here", type="norm")
    grad_clip.expect("engine.max_skipped_steps says what non-finite gradients do", error_if_nonfinite=False)
    max_norm, norm_type = grad_clip.take("max_norm"), grad_clip.take("norm_type")
    if max_norm is None:
        return {}
    made = {"max_norm": max_norm}
    if norm_type is not None and norm_type.value != 2:
        made["norm_type"] = node("inf", norm_type.where) if norm_type.value == math.inf else norm_type
    return {"grad_clip": Node(made, grad_clip.node.origins)}


def rules_0x(options: OldTable, parameters: list[Parameter] | None) -> list[Rule]:
    """Reads `paramwise_options`: regular expressions, all of which apply, in order."""
    rules = []
    names = {name: name for name in _known_options()}
    for pattern, table in _tables(options):
        chosen = None
        if parameters is not None and is_simple(pattern):
            chosen = {parameter.name for parameter in parameters if re.search(pattern, parameter.old)}
        rules.append(Rule(pattern, chosen, _options(table, names), table.where, table.key))
    return rules


def rules_1x(cfg: OldTable, parameters: list[Parameter] | None) -> list[Rule]:
    """Reads `paramwise_cfg`: the longest part of a name that is found decides alone, else kinds of parameters do."""
    custom = cfg.table("custom_keys")
    names = {name: name for name in _known_options() if not name.endswith("_mult")}
    names |= {"lr_mult": "lr_mult", "weight_decay_mult": "decay_mult"}
    tables = _tables(custom) if custom is not None else []
    left = None if parameters is None else list(parameters)
    chosen: dict[str, set[str] | None] = {}
    for key in sorted((key for key, _ in tables), key=lambda key: (-len(key), key)):
        chosen[key] = None if left is None else {parameter.name for parameter in left if key in parameter.old}
        left = None if left is None else [parameter for parameter in left if key not in parameter.old]
    by_name = [
        Rule(re.escape(key).replace(r"\_", "_"), chosen[key], _options(table, names), table.where, table.key)
        for key, table in tables
    ]
    return [*_by_kind(cfg, left), *by_name]


def _tables(options: OldTable) -> list[tuple[str, OldTable]]:
    """The rules by their patterns; those beyond MAX_RULES are reported."""
    options.lose(f"the {MAX_RULES} rules before it are enough", *list(options.rest)[MAX_RULES:])
    return [(pattern, table) for pattern in list(options.rest) if (table := options.table(pattern)) is not None]


def _by_kind(cfg: OldTable, left: list[Parameter] | None) -> list[Rule]:
    """Reads `norm_decay_mult` and the like, which apply to the parameters that no part of a name has chosen."""
    rules = []
    for key, ours, is_of_norm in (
        ("norm_decay_mult", "weight_decay_mult", True),
        ("bias_decay_mult", "weight_decay_mult", False),
        ("bias_lr_mult", "lr_mult", False),
    ):
        factor = cfg.take(key, "a number")
        if factor is not None and left is None:
            cfg.lost("the parameters that it means are not known here", key, at=factor)
        elif factor is not None and left is not None:
            same = [p.name for p in left if p.of_norm == is_of_norm and (is_of_norm or p.name.endswith(".bias"))]
            rules.append(Rule("", set(same), _in_words({ours: factor}), factor.where, (*cfg.key, key)))
    cfg.expect("every parameter has one name here", bypass_duplicate=False)
    return rules


def _known_options() -> list[str]:
    """The options that a rule can set."""
    return [key for key in committed_schema()["$defs"]["ParamRule"]["properties"] if key not in ("match", "kind")]


def _options(table: OldTable, names: dict[str, str]) -> dict[str, Node]:
    made = table.renamed(**names)
    return _in_words(made)


def _in_words(options: dict[str, Node]) -> dict[str, Node]:
    """Writes a decay multiplied by zero as no decay."""
    factor = options.get("weight_decay_mult")
    if factor is not None and factor.value in (0, False):
        others = {key: value for key, value in options.items() if key != "weight_decay_mult"}
        return {**others, "weight_decay": node(0.0, factor.where)}
    return options


def fix_rates(rules: list[Rule], hook: OldTable | None, old: OldTable) -> None:
    """Converts SimSiamHook, which resets the rates that are marked as fixed to its own `lr` in every epoch."""
    is_on = hook is not None and bool(hook.get("fix_pred_lr", "true or false", True))
    rate = hook.take("lr", "a number") if hook is not None else None
    for rule in (rule for rule in rules if "fix_lr" in rule.options):
        if not is_on:
            where = rule.options.pop("fix_lr")
            old.report.add(
                Effect.LOST, where.where, (*rule.key, "fix_lr"), "without SimSiamHook nothing there fixes the rate"
            )
        elif rate is not None and rate.value != old.peek("lr"):
            rule.options["lr"] = rate
    if hook is not None:
        hook.take("adjust_by_epoch")  # how often


def paramwise(rules: list[Rule], parameters: list[Parameter] | None, old: OldTable) -> list[Node]:
    """Converts rules to `[[optimizer.paramwise]]`; neighbors with equal options become one rule."""
    title = str(old.peek("type")).rpartition(".")[2]
    tables: list[Node] = []
    for rule in _joined([rule for rule in rules if _means_something(rule, title, old)]):
        if rule.chosen is None:
            text = "this pattern is taken as it is; our names of parameters may be others"
            old.report.add(Effect.CHANGED, rule.where, rule.key, text)
        tables.append(Node({**_choice(rule, parameters or []), **rule.options}, (rule.where,)))
    return tables


def _choice(rule: Rule, parameters: list[Parameter]) -> Part:
    """`kind` for a rule that means all parameters of some kinds, else `match`."""
    if rule.chosen is None:
        return {"match": node(escape(rule.pattern), rule.where)}
    for kinds in _KINDS:
        if rule.chosen == {parameter.name for parameter in parameters if parameter.is_one_of(kinds)}:
            return {"kind": node(kinds, rule.where)}
    pattern = pattern_of(rule.chosen, [parameter.name for parameter in parameters], rule.pattern)
    return {"match": node(escape(pattern), rule.where)}


def _means_something(rule: Rule, optimizer: str, old: OldTable) -> bool:
    """Drops and reports options that the optimizer does not have; False where nothing is left of the rule."""
    own = {*known("optimizers", optimizer), *_OF_ALL, *(("lars_exclude",) if optimizer == "LARS" else ())}
    for name in [name for name in rule.options if name.removesuffix("_mult") not in own]:
        where = rule.options.pop(name).where
        text = f"{optimizer} has no {name.removesuffix('_mult')}"
        old.report.add(Effect.LEFT, where, (*rule.key, name), text)
    if rule.chosen is not None and not rule.chosen:
        old.report.add(Effect.LOST, rule.where, rule.key, "it is found in the name of no trained parameter")
        return False
    return bool(rule.options)


def _joined(rules: list[Rule]) -> list[Rule]:
    """Joins neighbors with equal options."""
    joined: list[Rule] = []
    for rule in rules:
        last = joined[-1] if joined else None
        if last is not None and _plain(last) == _plain(rule) and (last.chosen is None) == (rule.chosen is None):
            chosen = None if last.chosen is None or rule.chosen is None else last.chosen | rule.chosen
            joined[-1] = last._replace(pattern=f"{last.pattern}|{rule.pattern}", chosen=chosen)
        else:
            joined.append(rule)
    return joined


def _plain(rule: Rule) -> dict[str, Any]:
    return {key: plain(value) for key, value in rule.options.items()}
