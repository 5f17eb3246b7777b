"""Optimizers of MMSelfSup in our words: options by parameter, clipping, accumulation."""

import math
import re
from typing import Any, NamedTuple

from sslrun.config.dump import escape
from sslrun.config.importer.parameters import Parameter, matching, pattern_of
from sslrun.config.importer.parts import Part, component, is_class, known, node
from sslrun.config.importer.table import OldTable
from sslrun.config.load import committed_schema
from sslrun.config.node import Key, Node, Origin, plain

MAX_RULES = 200
_OF_ALL = ("fix_lr", "freeze_iters")  # options of parameters that are none of an optimizer's own


class Rule(NamedTuple):
    """What some parameters get.

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
    """`[optimizer]`, with what has been made of it elsewhere."""
    name = old.type()
    if not is_class("optimizers", name):
        old.report.lost(old.where, old.key, f"there is no optimizer {name or 'without a type'} here")
        return None
    old.expect("dampening", 0, "momentum has no dampening here")
    if name == "LARS":
        old.expect("nesterov", False, "LARS has no Nesterov momentum here")
    if name == "AdamW":
        old.expect("amsgrad", False, "AdamW has no such variant here")
    old.lose("constructor", "layer-wise rates and the like are [[optimizer.paramwise]], rule by rule")
    return component(old, "optimizers", name, made)


def clipping(grad_clip: OldTable) -> Node | None:
    """`grad_clip`: of the norm of all gradients together."""
    grad_clip.expect("type", "norm", "gradients are clipped by their norm here")
    grad_clip.expect("error_if_nonfinite", False, "engine.max_skipped_steps says what non-finite gradients do")
    max_norm, norm_type = grad_clip.take("max_norm"), grad_clip.take("norm_type")
    grad_clip.finish("clipping has nothing like it here")
    if max_norm is None:
        return None
    made = {"max_norm": max_norm}
    if norm_type is not None and norm_type.value != 2:
        made["norm_type"] = node("inf", norm_type.where) if norm_type.value == math.inf else norm_type
    return Node(made, grad_clip.node.origins)


def rules_0x(options: OldTable, parameters: list[Parameter] | None) -> list[Rule]:
    """`paramwise_options`: regular expressions, all of which apply, in order."""
    rules = []
    for pattern in _some(options):
        table = options.table(pattern)
        if table is not None:
            chosen = None if parameters is None else matching(pattern, parameters)
            given = _options(table, {name: name for name in _known_options()})
            rules.append(Rule(pattern, chosen, given, table.where, table.key))
    return rules


def rules_1x(cfg: OldTable, parameters: list[Parameter] | None) -> list[Rule]:
    """`paramwise_cfg`: parts of names, of which the longest that is found decides alone; else kinds of parameters."""
    custom = cfg.table("custom_keys")
    names = {name: name for name in _known_options() if not name.endswith("_mult")}
    names |= {"lr_mult": "lr_mult", "decay_mult": "weight_decay_mult"}
    rules: list[Rule] = []
    left = None if parameters is None else list(parameters)
    keys = sorted(sorted(_some(custom)), key=len, reverse=True) if custom is not None else []
    for key in keys:
        assert custom is not None
        table = custom.table(key)
        if table is None:
            continue
        chosen = None
        if left is not None:
            chosen = {parameter.name for parameter in left if key in parameter.old}
            left = [parameter for parameter in left if parameter.name not in chosen]
        rules.append(Rule(re.escape(key).replace(r"\_", "_"), chosen, _options(table, names), table.where, table.key))
    if custom is not None:
        rules.sort(key=lambda rule: list(custom.node.value).index(str(rule.key[-1])))
    return [*_by_kind(cfg, left), *rules]


def _some(options: OldTable) -> list[str]:
    """The patterns of a table of rules; more than anybody has written are reported."""
    patterns = list(options.rest)
    for pattern in patterns[MAX_RULES:]:
        options.lose(pattern, f"the {MAX_RULES} rules before it are enough")
    return patterns[:MAX_RULES]


def _by_kind(cfg: OldTable, left: list[Parameter] | None) -> list[Rule]:
    """`norm_decay_mult` and its like, of what no part of a name has chosen."""
    kinds = (
        ("norm_decay_mult", "weight_decay_mult", lambda p: p.of_norm),
        ("bias_decay_mult", "weight_decay_mult", lambda p: p.name.endswith(".bias") and not p.of_norm),
        ("bias_lr_mult", "lr_mult", lambda p: p.name.endswith(".bias") and not p.of_norm),
    )
    rules = []
    for key, ours, chooses in kinds:
        factor = cfg.take(key, "a number")
        if factor is not None and left is None:
            cfg.report.lost(factor.where, (*cfg.key, key), "the parameters that it means are not known here")
        elif factor is not None and left is not None:
            chosen = {parameter.name for parameter in left if chooses(parameter)}
            rules.append(Rule("", chosen, _in_words({ours: factor}), factor.where, (*cfg.key, key)))
    cfg.expect("bypass_duplicate", False, "every parameter has one name here")
    return rules


def _known_options() -> list[str]:
    """What a rule can set."""
    return [name for name in committed_schema()["$defs"]["ParamRule"]["properties"] if name != "match"]


def _options(table: OldTable, names: dict[str, str]) -> dict[str, Node]:
    made = {ours: value for key, ours in names.items() if (value := table.take(key)) is not None}
    table.finish("[[optimizer.paramwise]] has nothing like it")
    return _in_words(made)


def _in_words(options: dict[str, Node]) -> dict[str, Node]:
    """Zero times the decay is no decay."""
    factor = options.get("weight_decay_mult")
    if factor is not None and factor.value in (0, False):
        options = {key: value for key, value in options.items() if key != "weight_decay_mult"}
        options["weight_decay"] = node(0.0, factor.where)
    return options


def fix_rates(rules: list[Rule], hook: OldTable | None, old: OldTable) -> None:
    """What SimSiamHook does: rates that are marked as fixed are put back to its own `lr` again and again."""
    is_on = hook is not None and bool(hook.get("fix_pred_lr", "true or false", True))
    rate = hook.take("lr", "a number") if hook is not None else None
    for rule in (rule for rule in rules if "fix_lr" in rule.options):
        if not is_on:
            text = "without SimSiamHook nothing there fixes the rate"
            old.report.lost(rule.options.pop("fix_lr").where, (*rule.key, "fix_lr"), text)
        elif rate is not None and rate.value != old.peek("lr"):
            rule.options["lr"] = rate
    if hook is not None:
        hook.take("adjust_by_epoch")  # how often
        hook.finish("SimSiam has nothing like it here")


def paramwise(rules: list[Rule], parameters: list[Parameter] | None, old: OldTable) -> list[Node]:
    """`[[optimizer.paramwise]]`: neighbors with equal options are one rule."""
    optimizer = str(old.peek("type")).rpartition(".")[2]
    tables: list[Node] = []
    names = [parameter.name for parameter in parameters] if parameters is not None else []
    for rule in _joined([rule for rule in rules if _means_something(rule, optimizer, old)]):
        if rule.chosen is None:
            text = "this pattern is taken as it is; our names of parameters may be others"
            old.report.changed(rule.where, rule.key, text)
            match = rule.pattern
        else:
            match = pattern_of(rule.chosen, names, rule.pattern)
        tables.append(Node({"match": node(escape(match), rule.where), **rule.options}, (rule.where,)))
    return tables


def _means_something(rule: Rule, optimizer: str, old: OldTable) -> bool:
    """Drops what cannot be said of a rule; False where nothing is left of it."""
    own = {*known("optimizers", optimizer), *_OF_ALL, *(("lars_exclude",) if optimizer == "LARS" else ())}
    for name in [name for name in rule.options if name.removesuffix("_mult") not in own]:
        where = rule.options.pop(name).where
        old.report.left(where, (*rule.key, name), f"{optimizer} has no {name.removesuffix('_mult')}")
    if rule.chosen is not None and not rule.chosen:
        old.report.lost(rule.where, rule.key, "it is found in the name of no trained parameter")
        return False
    return bool(rule.options)


def _joined(rules: list[Rule]) -> list[Rule]:
    """Neighbors with equal options as one rule."""
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
