"""Converts learning-rate schedules of mmcv (`lr_config`) and of mmengine (`param_scheduler`)."""

from sslrun.config.node import Node, plain
from sslrun.importer.old import OldTable, node
from sslrun.importer.ours import Part, component, present, steps, value_at

# mmcv's policy, without capitals -> ours.
_POLICIES = {
    "fixed": "Constant",
    "step": "Step",
    "exp": "Exp",
    "inv": "Inv",
    "poly": "Poly",
    "cosineannealing": "CosineAnnealing",
    "stepfixcosineannealing": "CosineAnnealing",
    "flatcosineannealing": "FlatCosineAnnealing",
    "cosinerestart": "CosineRestart",
    "cyclic": "Cyclic",
    "onecycle": "OneCycle",
}
_BY_ITER = ("Cyclic", "OneCycle")  # change by iteration by default

# mmengine's scheduler -> our policy, and {its argument: ours}.
_SCHEDULERS = {
    "CosineAnnealingLR": ("CosineAnnealing", {"eta_min": "min_lr", "eta_min_ratio": "min_lr_ratio"}),
    "MultiStepLR": ("Step", {"milestones": "step", "gamma": "gamma"}),
    "StepLR": ("Step", {"step_size": "step", "gamma": "gamma"}),
    "ExponentialLR": ("Exp", {"gamma": "gamma"}),
    "PolyLR": ("Poly", {"power": "power", "eta_min": "min_lr"}),
    "CosineRestartLR": ("CosineRestart", {"periods": "periods", "eta_min": "min_lr"}),
}
_FROM_THE_START = ("Step", "Exp")  # multiply what the warm-up makes of the rate, and count from the run's beginning
_WARMUPS = {"LinearLR": "linear", "ConstantLR": "constant"}


def lr_config(old: OldTable, accumulation: int) -> Node | None:
    """Converts an mmcv `lr_config`; None if sslrun has no such policy."""
    policy = old.get("policy", "a string", "")
    ours = _POLICIES.get(policy.removesuffix("LrUpdaterHook").lower())
    if ours is None:
        old.lost(f"there is no policy {policy or 'without a name'} here")
        return None
    made: Part = {}
    by_epoch = old.take("by_epoch", "true or false")
    is_by_epoch = by_epoch.value if by_epoch is not None else ours not in _BY_ITER
    for key in ("step", "periods") if not is_by_epoch else ():
        made |= present(**{key: steps(old, key, accumulation)})
    made |= _warmup(old, accumulation)
    if policy.lower().startswith("stepfix") and "warmup" in made:
        made["after_warmup"] = node(True, old.where)
    made["by"] = node("epoch" if is_by_epoch else "iter", (by_epoch or old.node).where)
    return component(old, "schedules", ours, made, tag="policy")


def _warmup(old: OldTable, accumulation: int) -> Part:
    kind = old.take("warmup")
    by_epoch = old.get("warmup_by_epoch", "true or false", False)
    if kind is None:
        for name in ("warmup_iters", "warmup_ratio"):
            old.leave("there is no warm-up", name)
        return {}
    ratio = old.take("warmup_ratio") or node(0.1, kind.where)
    length = old.take("warmup_iters") if by_epoch else steps(old, "warmup_iters", accumulation)
    if length is None:
        old.lost("a warm-up has a length", "warmup", at=kind)
        return {}
    name = "warmup_epochs" if by_epoch else "warmup_iters"
    return {"warmup": kind, name: length, "warmup_ratio": ratio}


def param_scheduler(
    tables: list[OldTable], epochs: int | None, iterations: int | None, accumulation: int
) -> Node | None:
    """Converts mmengine's schedulers: a warm-up, if any, and one policy after it or over it.

    Args:
        tables: the schedulers.
        epochs: length of the run, where that is how it is given.
        iterations: the same in iterations.
        accumulation: iterations in an optimizer step.
    """
    warmup: Part = {}
    warmed_up = (0, True)  # until when, and whether that is an epoch
    made: Node | None = None
    for old in tables:
        name = old.type()
        begin, end = old.get("begin", "a whole number", 0), old.take("end")
        by_epoch = old.get("by_epoch", "true or false", True)
        is_by_iter = bool(old.get("convert_to_iter_based", "true or false", False)) or not by_epoch
        if name in _WARMUPS and made is None and not warmup and begin == 0:
            warmup = _scheduler_warmup(old, _WARMUPS[name], end, by_epoch, is_by_iter, accumulation)
            warmed_up = (plain(end), by_epoch) if end is not None and warmup else warmed_up
        elif name in _SCHEDULERS and made is None:
            period = old.take("T_max")
            made = _scheduler(old, name, by_epoch, is_by_iter, warmup, accumulation)
            if value_at(made.value, "policy") in _FROM_THE_START:
                if begin not in (0, warmed_up[0]):
                    text = f"it counts from the start of the run here, not from {begin}"
                    old.changed(text)
                continue
            last = plain(end) if end is not None else None
            length = epochs if by_epoch else iterations
            if (begin, by_epoch) != (warmed_up if warmup else (0, by_epoch)):
                old.changed("it begins where the warm-up ends, or with the run")
            if last not in (None, length):
                old.changed(f"it lasts to the end of the run here, not to {last}")
            if period is not None and plain(period) != _difference(last or length, begin):
                text = f"half a cosine lasts from the begin to the end here, not for {plain(period)}"
                old.changed(text, "T_max", at=period)
        else:
            text = "only a warm-up from the start and one policy after it can be said here"
            old.give_up(f"{name or 'a scheduler without a type'}: {text}")
    if made is None and warmup:
        made = Node({"policy": node("Constant", tables[0].where), **warmup}, tables[0].node.origins)
    return made


def _difference(last: object, first: object) -> object:
    return last - first if isinstance(last, int) and isinstance(first, int) else None


def _scheduler_warmup(
    old: OldTable, kind: str, end: Node | None, by_epoch: bool, is_by_iter: bool, accumulation: int
) -> Part:
    ratio = old.take("start_factor") or old.take("factor") or node(1 / 3, old.where)
    if end is None:
        old.lost("a warm-up has an end")
        return {}
    if by_epoch and not is_by_iter:
        old.changed("a warm-up goes by iteration here, not by epoch")
    if not by_epoch:
        old.rest["end"] = end
        length = steps(old, "end", accumulation) or end
        return {"warmup": node(kind, old.where), "warmup_iters": length, "warmup_ratio": ratio}
    return {"warmup": node(kind, old.where), "warmup_epochs": end, "warmup_ratio": ratio}


def _scheduler(old: OldTable, name: str, by_epoch: bool, is_by_iter: bool, warmup: Part, accumulation: int) -> Node:
    policy, names = _SCHEDULERS[name]
    for key in ("milestones", "periods", "step_size") if not by_epoch else ():
        old.rest |= present(**{key: steps(old, key, accumulation)})
    made = old.renamed(**{ours: key for key, ours in names.items()})
    if warmup and policy not in _FROM_THE_START:
        made["after_warmup"] = node(True, old.where)
    made |= warmup
    made["by"] = node("iter" if is_by_iter else "epoch", old.where)
    if name == "MultiStepLR" and is_by_iter and by_epoch:
        made["by"] = node("epoch", old.where)  # its milestones are epochs, however often it looks
    return component(old, "schedules", policy, made, tag="policy")
