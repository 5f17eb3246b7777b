"""Converts the optimizer, its rules for some parameters, and gradient clipping."""

import re

from sslrun.config.dump import escape
from sslrun.config.node import Node, plain
from sslrun.config.schema_reader import committed_schema
from sslrun.importer.old import OldTable, node
from sslrun.importer.ours import Part, component, is_class, known, value_at

MAX_RULES = 200
# Rules choose parameters by names, and some names differ here: the first norm of a projector is `neck.bn0` there and
# `neck.mlp.1` here. These are the patterns of published configs, and the same parameters in our words.
_NORM = r"(bn|gn)(\d+)?.(weight|bias)"
_SAME_PATTERNS = {_NORM: r"bn\d*\.|mlp\.[147]\.", "bn": r"bn\d*\.|mlp\.[147]\.", "downsample.1": r"downsample\.1\."}
_SAME_NAMES = re.compile(r"(\\A|\^)?(backbone|neck|head|predictor)\.?|bias")  # patterns that mean the same here
_KINDS = {  # patterns of rules with equal options that mean all parameters of some kinds
    frozenset({"bn", "downsample.1"}): ["norm"],
    frozenset({_NORM, "downsample.1"}): ["norm"],
    frozenset({"bias"}): ["bias"],
    frozenset({"bn", "downsample.1", "bias"}): ["norm", "bias"],
    frozenset({_NORM, "downsample.1", "bias"}): ["norm", "bias"],
}


def optimizer(old: OldTable, made: Part) -> Node | None:
    """Converts the optimizer; `made` are the keys that were converted elsewhere."""
    name = old.type()
    if not is_class("optimizers", name):
        old.give_up(f"there is no optimizer {name or 'without a type'} here")
        return None
    return component(old, "optimizers", name, made)


def clipping(grad_clip: OldTable) -> Part:
    """Converts the limit on the norm of all gradients together."""
    max_norm, norm_type = grad_clip.take("max_norm"), grad_clip.take("norm_type")
    if max_norm is None:
        return {}
    made = {"max_norm": max_norm}
    if norm_type is not None and norm_type.value != 2:
        made["norm_type"] = norm_type
    return {"grad_clip": Node(made, grad_clip.node.origins)}


def paramwise(tables: OldTable, old: OldTable, model: Node | None, hook: OldTable | None) -> list[Node]:
    """Converts rules for some parameters; neighbors with equal options become one rule.

    Args:
        tables: `paramwise_options` of 0.x: regular expressions, all of which apply, in order. Or `custom_keys` of 1.x:
            parts of names, of which the longest that is found decides alone.
        old: the optimizer.
        model: the converted `[model]`.
        hook: SimSiamHook, which resets the rates that are marked as fixed to its own `lr` in every epoch.
    """
    is_1x = tables.key[-1] == "custom_keys"
    tables.why = f"the {MAX_RULES} rules before it are enough"
    joined: list[tuple[list[str], OldTable, Part]] = []
    for pattern in list(tables.rest)[:MAX_RULES]:
        rule = tables.table(pattern)
        options = _options(rule, is_1x, old, hook)
        if options:
            if joined and plain(node(joined[-1][2], rule.where)) == plain(node(options, rule.where)):
                joined[-1][0].append(pattern)
            else:
                joined.append(([pattern], rule, options))
    if is_1x and len(joined) > 1:
        tables.changed("all rules that fit apply here, in this order; there the longest name that fits decides alone")
    is_vit = value_at(model, "backbone", "type") == "VisionTransformer"
    return [node({**_choice(these, rule, is_1x, is_vit), **options}, rule.where) for these, rule, options in joined]


def _options(rule: OldTable, is_1x: bool, old: OldTable, hook: OldTable | None) -> Part:
    """The options of a rule in our words; those that the optimizer does not have are reported."""
    name = str(old.peek("type")).rpartition(".")[2]
    names = {key: key for key in committed_schema()["$defs"]["ParamRule"]["properties"] if key not in ("match", "kind")}
    if is_1x:
        names = {key: key for key in names if not key.endswith("_mult")}
        names |= {"lr_mult": "lr_mult", "weight_decay_mult": "decay_mult"}
    options = rule.renamed(**names)
    if "weight_decay_mult" in options and options["weight_decay_mult"].value in (0, False):
        options["weight_decay"] = node(0.0, options.pop("weight_decay_mult").where)
    own = {*known("optimizers", name), "fix_lr", "freeze_iters", *(("lars_exclude",) if name == "LARS" else ())}
    for key in [key for key in options if key.removesuffix("_mult") not in own]:
        rule.rest[key] = options.pop(key)
        rule.leave(f"{name} has no {key.removesuffix('_mult')}", key)
    if "fix_lr" in options and (hook is None or hook.peek("fix_pred_lr") is False):
        rule.lost("without SimSiamHook nothing there fixes the rate", "fix_lr", at=options.pop("fix_lr"))
    elif "fix_lr" in options and hook is not None and hook.peek("lr") not in (None, old.peek("lr")):
        options["lr"] = hook.rest["lr"]
    return options


def _choice(patterns: list[str], rule: OldTable, is_1x: bool, is_vit: bool) -> Part:
    """`kind` where the patterns are those that mean all parameters of some kinds, else `match`."""
    kinds = _KINDS.get(frozenset(patterns))
    if kinds is not None and not is_vit:  # whose norms have other names there
        return {"kind": node(kinds, rule.where)}
    if is_vit or not all(pattern in _SAME_PATTERNS or _SAME_NAMES.fullmatch(pattern) for pattern in patterns):
        rule.changed("this pattern is taken as it is; our names of parameters may be others")
    as_written = [re.escape(pattern).replace(r"\_", "_") if is_1x else pattern for pattern in patterns]
    ours = [
        written if is_vit else _SAME_PATTERNS.get(pattern, written)
        for pattern, written in zip(patterns, as_written, strict=True)
    ]
    return {"match": node(escape("|".join(ours)), rule.where)}
