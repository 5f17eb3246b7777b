"""Converts the optimizer, its rules for some parameters, and gradient clipping."""

import re

from sslrun.config.dump import escape
from sslrun.config.node import Node, plain
from sslrun.config.schema_reader import committed_schema
from sslrun.importer.old import OldTable, node
from sslrun.importer.ours import Part, component, known, names, value_at

# Rules choose parameters by names, and some names differ here: the first norm of a projector is `neck.bn0` there and
# `neck.mlp.1` here. These are the patterns of published configs, and the same parameters in our words.
_NORM = r"(bn|gn)(\d+)?.(weight|bias)"
_SAME_PATTERNS = {_NORM: r"bn\d*\.|mlp\.[147]\.", "bn": r"bn\d*\.|mlp\.[147]\.", "downsample.1": r"downsample\.1\."}
_SAME_NAMES = re.compile(r"(\\A|\^)?(backbone|neck|head|predictor)\.?|bias")  # patterns that mean the same here
_OF_VIT = {"bias", "pos_embed", "mask_token", "cls_token"}  # and norm or ln: all that masked methods do not decay
_KINDS = {  # patterns of rules with equal options that mean all parameters of some kinds
    frozenset({"bn", "downsample.1"}): ["norm"],
    frozenset({"bias"}): ["bias"],
    frozenset({"bn", "downsample.1", "bias"}): ["norm", "bias"],
}


def optimizer(old: OldTable, made: Part) -> Node | None:
    """Converts the optimizer; `made` are the keys that were converted elsewhere."""
    name = old.type()
    if name not in names("optimizers"):
        old.give_up(f"there is no optimizer {name or 'without a type'} here")
        return None
    return component(old, "optimizers", name, made)


def clipping(grad_clip: OldTable) -> Part:
    """Converts the limit on the norm of all gradients together."""
    made = grad_clip.renamed(max_norm="max_norm")
    if grad_clip.peek("norm_type") == 2:
        grad_clip.take("norm_type")
    return {"grad_clip": made | grad_clip.renamed(norm_type="norm_type")} if made else {}


def paramwise(rules: OldTable, old: OldTable, model: Node | None, hook: OldTable | None) -> list[Part]:
    """Converts rules for some parameters; neighbors with equal options become one rule.

    Args:
        rules: `paramwise_options` of 0.x: regular expressions, all of which apply, in order. Or `custom_keys` of 1.x:
            parts of names, of which the longest that is found decides alone.
        old: the optimizer.
        model: the converted `[model]`.
        hook: SimSiamHook, which resets the rates that are marked as fixed to its own `lr` in every epoch.
    """
    is_1x = rules.key[-1] == "custom_keys"
    joined: list[tuple[list[str], OldTable, Part]] = []
    for pattern in list(rules.rest):
        rule = rules.table(pattern)
        options = _options(rule, is_1x, old, hook)
        if options and joined and plain(node(joined[-1][2], rule.where)) == plain(node(options, rule.where)):
            joined[-1][0].append(pattern)
        elif options:
            joined.append(([pattern], rule, options))
    if is_1x and len(joined) > 1:
        rules.changed("all rules that fit apply here, in this order; there the longest name that fits decides alone")
    is_vit = value_at(model, "backbone", "type") == "VisionTransformer"
    return [_choice(patterns, rule, is_1x, is_vit) | options for patterns, rule, options in joined]


def _options(rule: OldTable, is_1x: bool, old: OldTable, hook: OldTable | None) -> Part:
    """The options of a rule in our words; those that the optimizer does not have are reported."""
    name = str(old.peek("type")).rpartition(".")[2]
    own = {*known("optimizers", name), "fix_lr", "freeze_iters", *(("lars_exclude",) if name == "LARS" else ())}
    keys = [key for key in committed_schema()["$defs"]["ParamRule"]["properties"] if key not in ("match", "kind")]
    options: Part = rule.renamed(**{key: key for key in keys if not (is_1x and key.endswith("_mult"))})
    if is_1x:
        options |= rule.renamed(lr_mult="lr_mult", weight_decay_mult="decay_mult")
    if value_at(options, "weight_decay_mult") == 0:
        options["weight_decay"] = node(0.0, options.pop("weight_decay_mult").where)
    for key in [key for key in options if key.removesuffix("_mult") not in own]:
        rule.rest[key] = options.pop(key)
        rule.leave(f"{name} has no {key.removesuffix('_mult')}", key)
    if "fix_lr" in options and (hook is None or hook.peek("fix_pred_lr") is False):
        del options["fix_lr"]
        rule.lost("without SimSiamHook nothing there fixes the rate", "fix_lr")
    elif "fix_lr" in options and hook is not None and hook.peek("lr") not in (None, old.peek("lr")):
        options["lr"] = hook.rest["lr"]
    return options


def _choice(patterns: list[str], rule: OldTable, is_1x: bool, is_vit: bool) -> Part:
    """`kind` where the patterns are those that mean all parameters of some kinds, else `match`."""
    if is_vit and _OF_VIT <= set(patterns) <= _OF_VIT | {"norm", "ln"}:
        return {"kind": ["norm", "bias", "embedding"]}
    kinds = _KINDS.get(frozenset("bn" if pattern == _NORM else pattern for pattern in patterns))
    if kinds is not None and not is_vit:  # whose norms have other names there
        return {"kind": kinds}
    same = {} if is_vit else _SAME_PATTERNS
    if is_vit or not all(pattern in same or _SAME_NAMES.fullmatch(pattern) for pattern in patterns):
        rule.changed("this pattern is taken as it is; our names of parameters may be others")
    as_written = {pattern: re.escape(pattern).replace(r"\_", "_") if is_1x else pattern for pattern in patterns}
    return {"match": escape("|".join(same.get(pattern, written) for pattern, written in as_written.items()))}
