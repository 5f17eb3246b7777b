"""Converts length, batch, seed, checkpoints and logs."""

import re

from sslrun.importer.old import Effect, OldTable
from sslrun.importer.ours import Part, value_at

_GPUS_BY_SAMPLES = re.compile(r"(?:^|[_-])(\d{1,5})xb(\d{1,6})(?:[_-]|$)")
_OF_A_PASS = re.compile(r"(?:^|_)bs(\d{1,6})(?:_|$)")  # in names of OpenSelfSup: samples on all GPUs
# By the hook or the backend that writes to them.
_PLACES = {"Tensorboard": "tensorboard", "Wandb": "wandb", "Mlflow": "mlflow", "MLflow": "mlflow"}
_OWN_LOG = ("TextLoggerHook", "LocalVisBackend")
_USUAL_HOOKS = (
    "RuntimeInfoHook", "IterTimerHook", "ParamSchedulerHook", "DistSamplerSeedHook", "SelfSupVisualizationHook",
)  # fmt: skip


def length(top: OldTable) -> Part:
    """Converts `runner`, `train_cfg` or `total_epochs` to `epochs` or `max_iters`."""
    if not top.peek("train_cfg"):
        top.take("train_cfg")  # of OpenSelfSup, where it is empty
    old = top.table("train_cfg" if "train_cfg" in top else "runner")
    total = top.take("total_epochs", "a whole number")  # of OpenSelfSup
    if not old:
        return {"epochs": total}
    title = old.type()
    by_epoch = old.get("by_epoch", "true or false", True) and not title.startswith("Iter")
    if title.removesuffix("TrainLoop").removesuffix("Runner") not in ("", "EpochBased", "IterBased"):
        old.lost(f"{title}: a run goes by epochs or iterations here")
    epochs, iterations = old.take("max_epochs", "a whole number"), old.steps("max_iters")
    return {"epochs": epochs} if iterations is None or (by_epoch and epochs) else {"max_iters": iterations}


def batch(top: OldTable, name: str, gpus: int | None, data: Part) -> Part:
    """Computes `global_batch`, and `engine` where an optimizer step has several backward passes.

    Args:
        top: the old config.
        name: of the old file, without `.py`.
        gpus: number of GPUs, where the user says so.
        data: the converted `[data]`.
    """
    named, of_a_pass = _GPUS_BY_SAMPLES.search(name), _OF_A_PASS.search(name)
    ids = top.get("gpu_ids", "a list", [])
    total = top.table("auto_scale_lr").get("base_batch_size", "a whole number", 0)
    samples = value_at(data, "samples_per_gpu")
    if not samples or samples < 1:
        return {}
    where, passes = data["samples_per_gpu"].where, top.report.accumulation

    def changed(text: str) -> None:
        top.report.add(Effect.CHANGED, where, ("data", "samples_per_gpu"), text)

    if named is not None and int(named[2]) != samples:
        changed(f"the name says {named[0].strip('_-')}, the batch on a GPU is {samples}")
    stated = [  # in this order
        gpus,
        int(named[1]) if named is not None else None,
        len(ids),
        total // (samples * passes),
        int(of_a_pass[1]) // samples if of_a_pass is not None else None,
    ]
    found = next((count for count in stated if count), None)
    if found is None:
        changed("nothing says for how many GPUs this batch is: global_batch is that of one; --gpus N says it")
    made: Part = {"global_batch": (found or 1) * samples * passes}
    if passes > 1:  # statistics and losses of one pass are over what is on the devices at once
        made["engine"] = {"micro_batch": samples, "split_sync_bn": True}
    return made


def start(top: OldTable) -> Part:
    """Converts seed, folder, and the weights to start from."""
    resume = top.peek("resume")
    held = "resume" if isinstance(resume, str) else "load_from" if resume and "load_from" in top else "resume_from"
    made: Part = top.renamed(seed="seed", work_dir="work_dir", resume_from=held, load_from="load_from")
    made |= top.table("randomness").renamed(seed="seed")
    if resume is True:
        top.leave("--resume goes on from a run's newest checkpoint", "resume")
    top.expect("expected a path, True or False", resume=False)
    if "work_dir" in made:
        top.changed("a folder is made in it for every run, with the recipe's name", "work_dir")
    if "load_from" in made:
        made["load_strict"] = False
        top.changed("what does not fit is left out, as there; but the old parameters have other names", "load_from")
    if "resume_from" in made:
        top.changed("a run is continued from a checkpoint of sslrun, not from one of the old framework", held)
    return made


def saving(top: OldTable) -> Part:
    """Converts hooks and options of saving and logging to `[checkpoint]` and `[log]`."""
    hooks = top.table("default_hooks")
    checkpoint = hooks.table("checkpoint") if hooks else top.table("checkpoint_config")
    logger = hooks.table("logger") if hooks else top.table("log_config")
    log: Part = {"interval": logger.steps("interval", is_exact=False)}
    for name in list(hooks.rest):
        hook = hooks.table(name)
        if hook and not is_off(hook) and (title := hook.type()) not in _USUAL_HOOKS:
            hook.give_up(f"there is no hook {title or 'without a type'} here")
    visualizer = top.table("visualizer")
    places = dict.fromkeys(map(_place, [*logger.tables("hooks"), *visualizer.tables("vis_backends")]))
    log |= {
        "hooks": [place for place in places if place is not None] or None,
        "level": top.take("log_level", "a string"),
    }
    made: Part = {"log": {key: value for key, value in log.items() if value is not None} or None}
    return made | ({"checkpoint": _checkpoints(checkpoint)} if checkpoint else {})


def is_off(hook: OldTable) -> bool:
    """Whether a hook is switched off; it is then reported as left out."""
    title = str(hook.peek("type")).rpartition(".")[2]
    is_on = hook.peek("enable") if title == "VisualizationHook" else hook.peek("enable") is not False
    if not is_on:
        hook.give_up("it is switched off", Effect.LEFT)
    return not is_on


def _checkpoints(old: OldTable) -> Part:
    """Converts `checkpoint_config`, or the `checkpoint` of `default_hooks`."""
    by_epoch = old.get("by_epoch", "true or false", True)
    interval = old.take("interval", "a whole number") if by_epoch else old.steps("interval")
    kept = old.get("max_keep_ckpts", "a whole number", -1)
    made: Part = {"max_keep_ckpts": kept if kept > 0 else -1}
    if interval is not None and interval.value < 1:
        old.lost("every so many epochs or iterations, at least 1", "interval")
    elif interval is not None:
        made = {"interval": interval, "by": "epoch" if by_epoch else "iter", **made}
    return made


def _place(hook: OldTable) -> str | None:
    """Converts a further place for metrics to one of `log.hooks`."""
    title = hook.type()
    place = _PLACES.get(title.removesuffix("LoggerHook").removesuffix("VisBackend"))
    if title in _OWN_LOG:
        hook.leave("the log is written anyway", *list(hook.rest))
    elif place is None:
        hook.give_up(f'{title or "a place"}: there are "tensorboard", "wandb" and "mlflow" here')
    hook.why = "set what you need of it in [log.wandb] or [log.mlflow]"
    return place
