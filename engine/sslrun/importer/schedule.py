"""Converts learning-rate schedules of mmcv (`lr_config`) and of mmengine (`param_scheduler`)."""

from sslrun.config.node import Node
from sslrun.importer.old import OldTable, node
from sslrun.importer.ours import Part, component, names

# mmcv's policies that have another name here.
_POLICIES = {"fixed": "constant", "stepfixcosineannealing": "cosineannealing"}
_BY_ITER = ("Cyclic", "OneCycle")  # change by iteration by default

# mmengine's scheduler -> our policy, and {our argument: there}.
_SCHEDULERS = {
    "CosineAnnealingLR": ("CosineAnnealing", {"min_lr": "eta_min", "min_lr_ratio": "eta_min_ratio"}),
    "MultiStepLR": ("Step", {"step": "milestones"}),
    "StepLR": ("Step", {"step": "step_size"}),
    "ExponentialLR": ("Exp", {}),
    "PolyLR": ("Poly", {"min_lr": "eta_min"}),
    "CosineRestartLR": ("CosineRestart", {"min_lr": "eta_min"}),
}
_IN_ITERATIONS = ("milestones", "periods", "step_size")  # unless they count epochs
_FROM_THE_START = ("Step", "Exp")  # multiply what the warm-up makes of the rate, and count from the run's beginning
_WARMUPS = {"LinearLR": "linear", "ConstantLR": "constant"}


def lr_config(old: OldTable) -> Node | None:
    """Converts an mmcv `lr_config`; None if sslrun has no such policy."""
    policy = old.get("policy", "a string", "").removesuffix("LrUpdaterHook").lower()
    ours = {name.lower(): name for name in names("schedules")}.get(_POLICIES.get(policy, policy))
    if ours is None:
        old.lost(f"there is no policy {policy or 'without a name'} here")
        return None
    by_epoch = old.get("by_epoch", "true or false", ours not in _BY_ITER)
    made: Part = {} if by_epoch else {key: old.steps(key) for key in ("step", "periods")}
    made |= _warmup(old) | {"by": "epoch" if by_epoch else "iter"}
    if policy.startswith("stepfix") and "warmup" in made:
        made["after_warmup"] = True
    return component(old, "schedules", ours, made, tag="policy")


def _warmup(old: OldTable) -> Part:
    kind, by_epoch = old.take("warmup"), old.get("warmup_by_epoch", "true or false", False)
    if kind is None:
        old.leave("there is no warm-up", "warmup_iters", "warmup_ratio")
        return {}
    length = old.take("warmup_iters") if by_epoch else old.steps("warmup_iters")
    if length is None:
        old.lost("a warm-up has a length", "warmup")
        return {}
    name = "warmup_epochs" if by_epoch else "warmup_iters"
    return {"warmup": kind, name: length, "warmup_ratio": old.take("warmup_ratio") or 0.1}


def param_scheduler(tables: list[OldTable], epochs: int | None, iterations: int | None) -> Node | None:
    """Converts mmengine's schedulers: a warm-up, if any, and one policy after it or over it.

    Args:
        tables: the schedulers.
        epochs: length of the run, where that is how it is given.
        iterations: the same in iterations.
    """
    warmup: Part = {}
    made: Node | None = None
    for old in tables:
        name = old.type()
        begin, end = old.get("begin", "a whole number", 0), old.peek("end")
        by_epoch = old.get("by_epoch", "true or false", True)
        is_by_iter = old.get("convert_to_iter_based", "true or false", False) or not by_epoch
        if name in _WARMUPS and made is None and not warmup and begin == 0:
            warmup = _scheduler_warmup(old, _WARMUPS[name], by_epoch, is_by_iter)
            warmed_up = (end, by_epoch)
        elif name in _SCHEDULERS and made is None:
            made = _scheduler(old, name, by_epoch, is_by_iter, warmup)
            start = warmed_up if warmup else (0, by_epoch)
            _check_span(old, name, (begin, by_epoch), start, epochs if by_epoch else iterations)
        else:
            text = "only a warm-up from the start and one policy after it can be said here"
            old.give_up(f"{name or 'a scheduler without a type'}: {text}")
    return made or (node({"policy": "Constant", **warmup}, tables[0].where) if warmup else None)


def _scheduler_warmup(old: OldTable, kind: str, by_epoch: bool, is_by_iter: bool) -> Part:
    length = old.take("end") if by_epoch else old.steps("end")
    ratio = old.first("start_factor", "factor") or 1 / 3
    if length is None:
        old.lost("a warm-up has an end")
        return {}
    if not is_by_iter:
        old.changed("a warm-up goes by iteration here, not by epoch")
    return {"warmup": kind, "warmup_epochs" if by_epoch else "warmup_iters": length, "warmup_ratio": ratio}


def _scheduler(old: OldTable, name: str, by_epoch: bool, is_by_iter: bool, warmup: Part) -> Node:
    policy, renamed = _SCHEDULERS[name]
    if not by_epoch:
        old.rest |= {key: count for key in _IN_ITERATIONS if (count := old.steps(key)) is not None}
    made: Part = {**old.renamed(**renamed), **warmup}
    if warmup and policy not in _FROM_THE_START:
        made["after_warmup"] = True
    counts_epochs = name == "MultiStepLR" and by_epoch  # its milestones are epochs, however often it looks
    made["by"] = "epoch" if counts_epochs or not is_by_iter else "iter"
    return component(old, "schedules", policy, made, tag="policy")


def _check_span(
    old: OldTable, name: str, begin: tuple[int, bool], start: tuple[object, bool], length: int | None
) -> None:
    """Reports when a scheduler begins and ends, where that is not when its policy does here.

    Args:
        old: the scheduler.
        name: its type.
        begin: when it begins, and whether that is an epoch.
        start: when the warm-up ends, or the start of the run; and whether that is an epoch.
        length: of the run.
    """
    end, period = old.get("end"), old.get("T_max")
    if _SCHEDULERS[name][0] in _FROM_THE_START:
        if begin[0] not in (0, start[0]):
            old.changed(f"it counts from the start of the run here, not from {begin[0]}")
        return
    if begin != start:
        old.changed("it begins where the warm-up ends, or with the run")
    if end not in (None, length):
        old.changed(f"it lasts to the end of the run here, not to {end}")
    last = end or length
    if period is not None and (not isinstance(last, int) or period != last - begin[0]):
        old.changed(f"half a cosine lasts from the begin to the end here, not for {period}", "T_max")
