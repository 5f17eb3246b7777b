"""Length, checkpoints and logs of an old recipe in our words."""

from sslrun.config.importer.parts import Part, node, steps
from sslrun.config.importer.table import OldTable

_SAVED = "a checkpoint holds all that a run needs to go on"
_PLACES = {
    "TensorboardLoggerHook": "tensorboard",
    "TensorboardVisBackend": "tensorboard",
    "WandbLoggerHook": "wandb",
    "WandbVisBackend": "wandb",
}
_OWN_LOG = ("TextLoggerHook", "LocalVisBackend")


def length(old: OldTable, accumulation: int) -> Part:
    """`runner` or `train_cfg`: epochs, or iterations."""
    old.leave("a run trains, and [monitor] measures beside it", "val_interval", "val_begin", "dynamic_intervals")
    title = old.type()
    by_epoch = old.get("by_epoch", "true or false", True)
    if title and title.removesuffix("TrainLoop").removesuffix("Runner") not in ("EpochBased", "IterBased"):
        old.report.lost(old.where, old.key, f"{title}: a run goes by epochs or iterations here")
    epochs, iterations = old.take("max_epochs", "a whole number"), steps(old, "max_iters", accumulation)
    old.finish("the length of a run is all that can be said here")
    if iterations is not None and (title.startswith("Iter") or not by_epoch or epochs is None):
        return {"max_iters": iterations}
    return {} if epochs is None else {"epochs": epochs}


def checkpoints(old: OldTable, accumulation: int) -> Part:
    """`checkpoint_config`, or the `checkpoint` of `default_hooks`."""
    old.expect_type("there is no such hook here", "CheckpointHook")
    made: Part = {}
    by_epoch = old.get("by_epoch", "true or false", True)
    interval = old.take("interval", "a whole number") if by_epoch else steps(old, "interval", accumulation)
    if interval is not None and interval.value < 1:
        old.report.lost(interval.where, (*old.key, "interval"), "every so many epochs or iterations, at least 1")
    elif interval is not None:
        made |= {"interval": interval, "by": node("epoch" if by_epoch else "iter", interval.where)}
    kept = old.take("max_keep_ckpts", "a whole number")
    made["max_keep_ckpts"] = node(-1, old.where) if kept is None or kept.value < 1 else kept
    old.leave(_SAVED, "save_optimizer", "save_param_scheduler", "create_symlink", "save_last", "sync_buffer")
    old.leave("checkpoints stand in the run folder", "out_dir", "filename_tmpl", "file_client_args", "backend_args")
    old.finish("[checkpoint] has nothing like it")
    return made


def log_0x(old: OldTable, accumulation: int) -> Part:
    """`log_config`."""
    made: Part = {}
    interval = steps(old, "interval", accumulation, is_exact=False)
    if interval is not None:
        made["interval"] = interval
    places = _places(old.tables("hooks"))
    if places:
        made["hooks"] = node(places, old.where)
    old.finish("[log] has nothing like it")
    return made


def log_1x(old: OldTable, accumulation: int) -> Part:
    """The `logger` of `default_hooks`."""
    old.expect_type("there is no such hook here", "LoggerHook")
    made: Part = {}
    interval = steps(old, "interval", accumulation, is_exact=False)
    if interval is not None:
        made["interval"] = interval
    old.leave("every row is a mean over its interval", "ignore_last", "interval_exp_name")
    old.leave("logs stand in the run folder", "out_dir", "keep_local", "log_metric_by_epoch", "file_client_args")
    old.finish("[log] has nothing like it")
    return made


def visualizer(old: OldTable) -> Part:
    """`visualizer`: other places for the metrics."""
    old.type()
    old.take("name")
    places = _places(old.tables("vis_backends"))
    old.finish("[log] has nothing like it")
    return {"hooks": node(places, old.where)} if places else {}


def _places(hooks: list[OldTable]) -> list[str]:
    """Further places for metrics, each once."""
    found: list[str] = []
    for hook in hooks:
        title = hook.type()
        if title in _PLACES:
            found += [_PLACES[title]] if _PLACES[title] not in found else []
            hook.finish("log.hooks names places, without arguments")
        elif title in _OWN_LOG:
            hook.leave("the log is written anyway", *hook.rest)
        else:
            hook.report.lost(hook.where, hook.key, f'{title or "a place"}: there are "tensorboard" and "wandb" here')
    return found
