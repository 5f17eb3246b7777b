"""Converts length, batch, seed, checkpoints and logs."""

import re

from sslrun.importer.images import Images
from sslrun.importer.old import Effect, OldTable, node
from sslrun.importer.ours import Part, present, steps

_GPUS_BY_SAMPLES = re.compile(r"(?:^|[_-])(\d{1,5})xb(\d{1,6})(?:[_-]|$)")
_OF_A_PASS = re.compile(r"(?:^|_)bs(\d{1,6})(?:_|$)")  # in names of OpenSelfSup: samples on all GPUs
_PLACES = {
    "TensorboardLoggerHook": "tensorboard",
    "TensorboardVisBackend": "tensorboard",
    "WandbLoggerHook": "wandb",
    "WandbVisBackend": "wandb",
}
_OWN_LOG = ("TextLoggerHook", "LocalVisBackend")
_USUAL_HOOKS = (
    "RuntimeInfoHook",
    "IterTimerHook",
    "ParamSchedulerHook",
    "DistSamplerSeedHook",
    "SelfSupVisualizationHook",
)


def length(top: OldTable, accumulation: int) -> Part:
    """Converts `runner`, `train_cfg` or `total_epochs` to `epochs` or `max_iters`."""
    if not top.peek("train_cfg"):
        top.take("train_cfg")  # of OpenSelfSup, where it is empty
    old = top.table("train_cfg" if "train_cfg" in top else "runner")
    total = top.take("total_epochs", "a whole number")  # of OpenSelfSup
    if not old:
        return present(epochs=total)
    title = old.type()
    by_epoch = old.get("by_epoch", "true or false", True)
    if title and title.removesuffix("TrainLoop").removesuffix("Runner") not in ("EpochBased", "IterBased"):
        old.lost(f"{title}: a run goes by epochs or iterations here")
    epochs, iterations = old.take("max_epochs", "a whole number"), steps(old, "max_iters", accumulation)
    if iterations is not None and (title.startswith("Iter") or not by_epoch or epochs is None):
        return {"max_iters": iterations}
    return present(epochs=epochs)


def batch(top: OldTable, name: str, gpus: int | None, accumulation: int, images: Images) -> Part:
    """Computes `global_batch`, and `engine` where an optimizer step has several backward passes.

    Args:
        top: the old config.
        name: of the old file, without `.py`.
        gpus: number of GPUs, where the user says so.
        accumulation: backward passes for one optimizer step.
        images: the converted data.
    """
    named, of_a_pass = _GPUS_BY_SAMPLES.search(name), _OF_A_PASS.search(name)
    ids, scaling = top.take("gpu_ids", "a list"), top.table("auto_scale_lr")
    total = scaling.get("base_batch_size", "a whole number")
    samples = images.samples_per_gpu
    if not samples or samples < 1:
        return {}
    where = images.part["samples_per_gpu"].where

    def changed(text: str) -> None:
        top.report.add(Effect.CHANGED, where, ("data", "samples_per_gpu"), text)

    if named is not None and int(named[2]) != samples:
        changed(f"the name says {named[0].strip('_-')}, the batch on a GPU is {samples}")
    stated = [  # in this order
        gpus,
        int(named[1]) if named is not None else None,
        len(ids.value) if ids is not None else None,
        total // (samples * accumulation) if total is not None else None,
        int(of_a_pass[1]) // samples if of_a_pass is not None else None,
    ]
    found = next((count for count in stated if count), None)
    if found is None:
        changed("nothing says for how many GPUs this batch is: global_batch is that of one; --gpus N says it")
    made = {"global_batch": node((found or 1) * samples * accumulation, where)}
    if accumulation > 1:  # statistics and losses of one pass are over what is on the devices at once
        made["engine"] = node({"micro_batch": samples}, where)
    return made


def start(top: OldTable) -> Part:
    """Converts seed, folder, and the weights to start from."""
    seed = top.take("seed", "a whole number")
    seed = top.table("randomness").take("seed", "a whole number") or seed
    folder = top.take("work_dir", "a string")
    made = present(seed=seed, work_dir=folder)
    if folder is not None:
        top.changed("a folder is made in it for every run, with the recipe's name", "work_dir", at=folder)
    weights, checkpoint = top.take("load_from", "a string"), top.take("resume_from", "a string")
    resume = top.take("resume")
    if resume is not None and isinstance(resume.value, str):
        checkpoint = resume
    elif resume is not None and resume.value:
        top.report.add(Effect.LEFT, resume.where, ("resume",), "--resume goes on from a run's newest checkpoint")
        weights, checkpoint = None, weights or checkpoint
    if weights is not None:
        made |= {"load_from": weights, "load_strict": node(False, weights.where)}
        text = "what does not fit is left out, as there; but the old parameters have other names"
        top.changed(text, "load_from", at=weights)
    if checkpoint is not None:
        made["resume_from"] = checkpoint
        text = "a run is continued from a checkpoint of sslrun, not from one of the old framework"
        top.changed(text, "resume_from", at=checkpoint)
    return made


def saving(top: OldTable, accumulation: int) -> Part:
    """Converts hooks and options of saving and logging to `[checkpoint]` and `[log]`."""
    made: Part = {}
    defaults = top.table("default_hooks")
    config = defaults.table("checkpoint") if defaults else top.table("checkpoint_config")
    if config:
        made["checkpoint"] = node(_checkpoints(config, accumulation), config.where)
    log = _log(defaults.table("logger") if defaults else top.table("log_config"), accumulation)
    for name in list(defaults.rest):
        hook = defaults.table(name)
        if hook and not is_off(hook):
            title = hook.type()
            if title not in _USUAL_HOOKS:
                hook.give_up(f"there is no hook {title or 'without a type'} here")
    visualizer = top.table("visualizer")
    log |= _places(visualizer.tables("vis_backends"), visualizer)
    log |= present(level=top.take("log_level", "a string"))
    return made | ({"log": node(log, top.where)} if log else {})


def is_off(hook: OldTable) -> bool:
    """Whether a hook is switched off; it is then reported as left out."""
    title = str(hook.peek("type")).rpartition(".")[2]
    is_on = hook.peek("enable") if title == "VisualizationHook" else hook.peek("enable") is not False
    if not is_on:
        hook.rest.clear()
        hook.report.add(Effect.LEFT, hook.where, hook.key, "it is switched off")
    return not is_on


def _checkpoints(old: OldTable, accumulation: int) -> Part:
    """Converts `checkpoint_config`, or the `checkpoint` of `default_hooks`."""
    made: Part = {}
    by_epoch = old.get("by_epoch", "true or false", True)
    interval = old.take("interval", "a whole number") if by_epoch else steps(old, "interval", accumulation)
    if interval is not None and interval.value < 1:
        old.lost("every so many epochs or iterations, at least 1", "interval", at=interval)
    elif interval is not None:
        made |= {"interval": interval, "by": node("epoch" if by_epoch else "iter", interval.where)}
    kept = old.take("max_keep_ckpts", "a whole number")
    made["max_keep_ckpts"] = node(-1, old.where) if kept is None or kept.value < 1 else kept
    return made


def _log(old: OldTable, accumulation: int) -> Part:
    """Converts `log_config`, or the `logger` of `default_hooks`."""
    interval = steps(old, "interval", accumulation, is_exact=False)
    return present(interval=interval) | _places(old.tables("hooks"), old)


def _places(hooks: list[OldTable], old: OldTable) -> Part:
    """Converts further places for metrics to `log.hooks`, each once."""
    found: dict[str, None] = {}
    for hook in hooks:
        title = hook.type()
        if title in _PLACES:
            found[_PLACES[title]] = None
            hook.why = "log.hooks names places, without arguments"
        elif title in _OWN_LOG:
            for name in list(hook.rest):
                hook.leave("the log is written anyway", name)
        else:
            hook.give_up(f'{title or "a place"}: there are "tensorboard" and "wandb" here')
    return {"hooks": node(list(found), old.where)} if found else {}
