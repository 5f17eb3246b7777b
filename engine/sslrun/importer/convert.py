"""Converts an old config as a whole: which old table becomes which table of the recipe."""

from sslrun.config.node import plain
from sslrun.importer import runtime
from sslrun.importer.images import Images, images_0x, images_1x, validation_interval
from sslrun.importer.methods import Around, model
from sslrun.importer.old import Effect, OldTable, node
from sslrun.importer.optimizer import clipping, optimizer, paramwise
from sslrun.importer.ours import Part, value_at
from sslrun.importer.schedule import lr_config, param_scheduler

_ENGINE = "machines are [engine]'s business, ranks the launcher's"
_THREADS = "images are decoded by threads, data.workers_per_gpu of them"
_MONITOR = "[monitor] measures beside training, on data.holdout"
_PRECISION = "engine.precision is bf16 where a device has it, and that needs no scaling of the loss"
_LEFT = {  # top-level keys that change nothing here, and why
    **dict.fromkeys(("dist_params", "env_cfg", "launcher", "gpus", "device", "local_rank", "cudnn_benchmark"), _ENGINE),
    **dict.fromkeys(("opencv_num_threads", "mp_start_method"), _THREADS),
    **dict.fromkeys(("val_dataloader", "test_dataloader", "val_evaluator", "test_evaluator"), _MONITOR),
    **dict.fromkeys(("val_cfg", "test_cfg", "evaluation"), _MONITOR),
    "persistent_workers": "loader threads live as long as the run",
    "prefetch": "images are decoded and normalized ahead of the step anyway",
    "find_unused_parameters": "a method uses all of its parameters, or says which it does not",
    "fp16": _PRECISION,
    "default_scope": "there is one set of names here",
    "log_processor": "every row of metrics.jsonl is a mean over its interval",
    "auto_resume": "--resume goes on from a run's newest checkpoint",
}
_OPTIMIZER_HOOKS = (
    "OptimizerHook", "Fp16OptimizerHook", "DistOptimizerHook", "GradAccumFp16OptimizerHook",
    "GradientCumulativeOptimizerHook", "GradientCumulativeFp16OptimizerHook",
)  # fmt: skip
_WRAPPERS = ("OptimWrapper", "AmpOptimWrapper", "ApexOptimWrapper")
_PACKAGES = ("openselfsup", "mmselfsup", "mmpretrain", "mmcls", "mmcv", "mmengine")


def convert(top: OldTable, name: str, gpus: int | None) -> Part:
    """Returns the recipe, as far as the old config could be converted; other keys stay in the old table.

    Args:
        top: the old config.
        name: of the old file, without `.py`.
        gpus: number of GPUs that the batch is for, where the user says so.
    """
    options = top.table("optim_wrapper" if "optim_wrapper" in top else "optimizer_config")
    names = ("update_interval", "cumulative_iters", "accumulative_counts", "accumulative_iters")
    count = options.first(*names, kind="a whole number") if options is not None else None
    accumulation = count.value if count is not None and count.value > 0 else 1
    frozen = options.table("frozen_layers_cfg") if options is not None else None
    images = _images(top)
    hooks = _hooks(top)
    made = runtime.length(top, accumulation)
    batch = runtime.batch(top, name, gpus, accumulation, images)
    made |= {key: batch[key] for key in ("global_batch",) if key in batch}
    made |= runtime.start(top)
    old_model = top.table("model")
    if old_model is not None:
        converted = model(old_model, Around(hooks, frozen, accumulation, images.num_views))
        made |= {"model": converted} if converted is not None else {}
    if images.part:
        made["data"] = node(images.part, top.where)
    made |= _optimizer(top, options, hooks, made)
    made |= _learning_rate(top, made, accumulation)
    made |= {key: batch[key] for key in ("engine",) if key in batch}
    made |= _validation(top, "holdout" in images.part)
    made |= runtime.saving(top, accumulation)
    _imports(top)
    for title, hook in hooks.items():
        hook.give_up(f"there is no hook {title or 'without a type'} here")
    for key, why in _LEFT.items():
        top.leave(why, key)
    return made


def _images(top: OldTable) -> Images:
    loader = top.table("train_dataloader")
    if loader is not None:
        own = top.rest["model"].value.get("data_preprocessor") if isinstance(top.peek("model"), dict) else None
        if own is None or not isinstance(own.value, dict):
            return images_1x(loader, top.table("data_preprocessor"))
        top.leave("the model has one of its own", "data_preprocessor")
        return images_1x(loader, OldTable(own, ("model", "data_preprocessor"), top.report, top.framework))
    data = top.table("data")
    return images_0x(data, top) if data is not None else Images({}, None, None)


def _hooks(top: OldTable) -> dict[str, OldTable]:
    """The custom hooks that are switched on, by their types."""
    hooks: dict[str, OldTable] = {}
    for hook in top.tables("custom_hooks"):
        if runtime.is_off(hook):
            continue
        title = hook.type()
        hook.take("priority")  # of one hook before another
        if title in hooks:
            hook.give_up(f"a second {title}")
        else:
            hooks[title] = hook
    return hooks


def _optimizer(top: OldTable, options: OldTable | None, hooks: dict[str, OldTable], recipe: Part) -> Part:
    """Converts `[optimizer]`, which stands in the wrapper of 1.x, or beside the hook of 0.x."""
    wrapper = options if options is not None and options.key == ("optim_wrapper",) else None
    old = (wrapper or top).table("optimizer")
    made: Part = {}
    if options is not None:
        made = clipping(options.table("clip_grad" if wrapper is not None else "grad_clip"))
        options.expect_type("there is nothing like it here", *(_WRAPPERS if wrapper is not None else _OPTIMIZER_HOOKS))
        options.lose("layer-wise rates and the like are [[optimizer.paramwise]], rule by rule", "constructor")
        options.leave(_PRECISION, "loss_scale", "dtype", "use_fp16")
        options.leave("gradients are summed over ranks by the engine", "coalesce", "bucket_size_mb", "distributed")
    cfg = wrapper.table("paramwise_cfg") if wrapper is not None else None
    hook = hooks.pop("SimSiamHook", None)
    if old is None:
        return {}
    given = old.table("paramwise_options")
    if given is None and cfg is not None:
        given = cfg.table("custom_keys")
        why = '[[optimizer.paramwise]] with kind = ["norm"] or ["bias"] says it here'
        cfg.lose(why, "norm_decay_mult", "bias_decay_mult", "bias_lr_mult")
        cfg.expect("every parameter has one name here", bypass_duplicate=False)
    listed = paramwise(given, old, recipe.get("model"), hook)
    if hook is not None:
        for key in ("fix_pred_lr", "lr", "adjust_by_epoch"):
            hook.take(key)
    if value_at(recipe, "model", "freeze_prototypes_iters") is not None:
        frozen = {"match": r"^head\.prototypes\.", "freeze_iters": "${model.freeze_prototypes_iters}"}
        listed.append(node(frozen, old.where))
    converted = optimizer(old, made | ({"paramwise": node(listed, old.where)} if listed else {}))
    return {} if converted is None else {"optimizer": converted}


def _learning_rate(top: OldTable, recipe: Part, accumulation: int) -> Part:
    schedulers = top.tables("param_scheduler")
    top.lose("the optimizer's momentum follows no schedule here", "momentum_config")
    if schedulers:
        epochs, steps = value_at(recipe, "epochs"), value_at(recipe, "max_iters")
        made = param_scheduler(schedulers, epochs, steps and steps * accumulation, accumulation)
    else:
        config = top.table("lr_config")
        made = lr_config(config, accumulation) if config is not None else None
    return {} if made is None else {"lr": made}


def _validation(top: OldTable, has_holdout: bool) -> Part:
    """Converts `workflow`: training, or training and validation in turn."""
    interval = validation_interval(top)
    workflow = top.take("workflow")
    if workflow is not None and interval is not None and has_holdout:
        return {"monitor": node({"loss_interval": interval}, workflow.where)}
    if workflow is not None and plain(workflow) != [["train", 1]]:
        text = "a run trains, and monitor.loss_interval measures the loss on data.holdout beside it"
        top.lost(text, "workflow", at=workflow)
    return {}


def _imports(top: OldTable) -> None:
    """Reports `custom_imports`: only modules of the frameworks themselves are not missed."""
    named = top.peek("custom_imports")
    modules = named.get("imports") if isinstance(named, dict) else None
    modules = modules if isinstance(modules, list) else [modules]
    is_own = all(isinstance(module, str) and module.partition(".")[0] in _PACKAGES for module in modules)
    taken = top.take("custom_imports")
    if taken is not None and is_own:
        why = "the old framework's own modules, whose classes are known here"
        top.report.add(Effect.LEFT, taken.where, ("custom_imports",), why)
    elif taken is not None:
        why = "modules for the old registries; custom_imports here names modules with classes of sslrun's"
        top.lost(why, "custom_imports", at=taken)
