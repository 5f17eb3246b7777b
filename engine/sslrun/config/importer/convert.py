"""An old configuration as a recipe of ours: which old table becomes which new one, and what is left over."""

import re

from sslrun.config.importer import runtime, schedule
from sslrun.config.importer.images import Images, images_0x, images_1x, validation_interval
from sslrun.config.importer.methods import model
from sslrun.config.importer.optimizer import clipping, fix_rates, optimizer, paramwise, rules_0x, rules_1x
from sslrun.config.importer.parameters import trained
from sslrun.config.importer.parts import Part, node, value_at
from sslrun.config.importer.table import OldTable
from sslrun.config.node import Node, plain

_BATCH = re.compile(r"(?:^|[_-])(\d{1,5})xb(\d{1,6})(?:[_-]|$)")

_ENGINE = "machines are [engine]'s business, ranks the launcher's"
_THREADS = "images are decoded by threads, data.workers_per_gpu of them"
_MONITOR = "[monitor] measures beside training, on data.holdout"
_LEFT = {  # top-level keys that change nothing here, and why
    **dict.fromkeys(("dist_params", "env_cfg", "launcher", "gpus", "device", "local_rank", "cudnn_benchmark"), _ENGINE),
    **dict.fromkeys(("opencv_num_threads", "mp_start_method"), _THREADS),
    **dict.fromkeys(("val_dataloader", "test_dataloader", "val_evaluator", "test_evaluator"), _MONITOR),
    **dict.fromkeys(("val_cfg", "test_cfg", "evaluation"), _MONITOR),
    "persistent_workers": "loader threads live as long as the run",
    "find_unused_parameters": "a method uses all of its parameters, or says which it does not",
    "fp16": "engine.precision is bf16 where a device has it, and that needs no scaling of the loss",
    "default_scope": "there is one set of names here",
    "log_processor": "every row of metrics.jsonl is a mean over its interval",
    "auto_resume": "--resume goes on from a run's newest checkpoint",
}
_OPTIMIZER_HOOKS = (
    "OptimizerHook",
    "Fp16OptimizerHook",
    "DistOptimizerHook",
    "GradAccumFp16OptimizerHook",
    "GradientCumulativeOptimizerHook",
    "GradientCumulativeFp16OptimizerHook",
)
_USUAL_HOOKS = {
    "runtime_info": "RuntimeInfoHook",
    "timer": "IterTimerHook",
    "param_scheduler": "ParamSchedulerHook",
    "sampler_seed": "DistSamplerSeedHook",
    "visualization": "SelfSupVisualizationHook",
}
SUPERSEDED = {  # keys of 0.x that say nothing beside those of 1.x
    "optimizer": "optim_wrapper",
    "optimizer_config": "optim_wrapper",
    "lr_config": "param_scheduler",
    "data": "train_dataloader",
    "runner": "train_cfg",
    "checkpoint_config": "default_hooks",
    "log_config": "default_hooks",
}


def convert(top: OldTable, name: str, gpus: int | None) -> Part:
    """The recipe, as far as it could be converted; what nothing takes stays in the old table.

    Args:
        top: the old configuration.
        name: of the old file, without `.py`.
        gpus: number of GPUs that the batch is for, where the user says so.
    """
    inverse_momentum = top.peek("default_scope") == "mmpretrain"
    options = top.table("optim_wrapper" if "optim_wrapper" in top else "optimizer_config")
    accumulation = _accumulation(options)
    frozen = options.table("frozen_layers_cfg") if options is not None else None
    images = _images(top)
    hooks = _hooks(top)
    made: Part = _length(top, accumulation)
    batch = _batch(top, name, gpus, accumulation, images)
    made |= {key: batch[key] for key in ("global_batch",) if key in batch}
    made |= _run(top)
    old_model = top.table("model")
    if old_model is not None:
        converted = model(old_model, hooks, frozen, accumulation, images.num_views, inverse_momentum)
        made |= {"model": converted} if converted is not None else {}
    if images.part:
        made["data"] = node(images.part, top.where)
    made |= _optimizer(top, options, hooks, made)
    made |= _learning_rate(top, made, accumulation)
    if "micro_batch" in batch:
        made["engine"] = node({"micro_batch": batch["micro_batch"]}, top.where)
    made |= _validation(top, "holdout" in images.part)
    made |= _saving(top, accumulation)
    for title, hook in hooks.items():
        hook.report.lost(hook.where, hook.key, f"there is no hook {title or 'without a type'} here")
    for key, why in _LEFT.items():
        top.leave(why, key)
    return made


def _accumulation(options: OldTable | None) -> int:
    """Backward passes for one optimizer step."""
    names = ("update_interval", "cumulative_iters", "accumulative_counts", "accumulative_iters")
    count = options.first(*names, kind="a whole number") if options is not None else None
    return count.value if count is not None and count.value > 0 else 1


def _images(top: OldTable) -> Images:
    loader = top.table("train_dataloader")
    if loader is not None:
        own = top.rest["model"].value if "model" in top and isinstance(top.rest["model"].value, dict) else {}
        if "data_preprocessor" in own and isinstance(own["data_preprocessor"].value, dict):
            preprocessor = OldTable(own["data_preprocessor"], ("model", "data_preprocessor"), top.report)
            return images_1x(loader, preprocessor)
        return images_1x(loader, top.table("data_preprocessor"))
    data = top.table("data")
    return images_0x(data, top) if data is not None else Images({}, None, None)


def _hooks(top: OldTable) -> dict[str, OldTable]:
    """The custom hooks by their types."""
    hooks: dict[str, OldTable] = {}
    for hook in top.tables("custom_hooks"):
        title = hook.type()
        hook.take("priority")  # of one hook before another
        if title in hooks:
            hook.report.lost(hook.where, hook.key, f"a second {title}")
        else:
            hooks[title] = hook
    return hooks


def _length(top: OldTable, accumulation: int) -> Part:
    table = top.table("train_cfg" if "train_cfg" in top else "runner")
    made = runtime.length(table, accumulation) if table is not None else {}
    total = top.take("total_epochs", "a whole number")  # of OpenSelfSup
    return made or ({} if total is None else {"epochs": total})


def _batch(top: OldTable, name: str, gpus: int | None, accumulation: int, images: Images) -> Part:
    """`global_batch`, and what is at once on a device where it is made of several passes."""
    named = _BATCH.search(name)
    ids, scaling = top.take("gpu_ids", "a list"), top.table("auto_scale_lr")
    total = scaling.get("base_batch_size", "a whole number") if scaling is not None else None
    if scaling is not None:
        scaling.expect("enable", False, "a learning rate belongs to a batch here: nothing scales it")
        scaling.finish("there is no such option here")
    samples = images.samples_per_gpu
    if not samples or samples < 1:
        return {}
    where = images.part["samples_per_gpu"].where
    key = ("data", "samples_per_gpu")
    if named is not None and int(named[2]) != samples:
        top.report.changed(where, key, f"the name says {named[0].strip('_-')}, the batch on a GPU is {samples}")
    if gpus is None and named is not None:
        gpus = int(named[1])
    if gpus is None and ids is not None:
        gpus = len(ids.value)
    if gpus is None and total is not None and total >= samples * accumulation:
        gpus = total // (samples * accumulation)
    if not gpus:
        gpus = 1
        text = "nothing says for how many GPUs this batch is: global_batch is that of one; --gpus N says it"
        top.report.changed(where, key, text)
    made = {"global_batch": node(gpus * samples * accumulation, where)}
    if accumulation > 1:  # statistics and losses of one pass are over what is on the devices at once
        made["micro_batch"] = node(samples, where)
    return made


def _run(top: OldTable) -> Part:
    """Seed, folder, weights to start from."""
    made: Part = {}
    randomness = top.table("randomness")
    seed = top.take("seed", "a whole number")
    if randomness is not None:
        seed = randomness.take("seed", "a whole number") or seed
        randomness.leave("a run follows from its seed alone, on any number of ranks", "deterministic", "diff_rank_seed")
        randomness.finish("there is no such option here")
    if seed is not None:
        made["seed"] = seed
    folder = top.take("work_dir", "a string")
    if folder is not None:
        made["work_dir"] = folder
        text = "a folder is made in it for every run, with the recipe's name"
        top.report.changed(folder.where, ("work_dir",), text)
    weights, checkpoint, resume = top.take("load_from", "a string"), top.take("resume_from", "a string"), None
    resume = top.take("resume")
    if resume is not None and isinstance(resume.value, str):
        checkpoint = resume
    elif resume is not None and resume.value and weights is not None:
        weights, checkpoint = None, weights
    elif resume is not None and resume.value:
        top.report.left(resume.where, ("resume",), "--resume goes on from a run's newest checkpoint")
    if weights is not None:
        made |= {"load_from": weights, "load_strict": node(False, weights.where)}
        text = "what does not fit is left out, as there; but parameters of MMSelfSup have other names"
        top.report.changed(weights.where, ("load_from",), text)
    if checkpoint is not None:
        made["resume_from"] = checkpoint
        text = "a run is continued from a checkpoint of sslrun, not from one of MMSelfSup"
        top.report.changed(checkpoint.where, ("resume_from",), text)
    return made


def _optimizer(top: OldTable, options: OldTable | None, hooks: dict[str, OldTable], recipe: Part) -> Part:
    """`[optimizer]`: of the wrapper of 1.x, or beside the hook's options of 0.x."""
    is_wrapper = options is not None and options.key == ("optim_wrapper",)
    old = options.table("optimizer") if options is not None and is_wrapper else top.table("optimizer")
    clip = _clip(options, is_wrapper)
    cfg = options.table("paramwise_cfg") if options is not None and is_wrapper else None
    if options is not None:
        _leave_options(options, is_wrapper)
    hook = hooks.pop("SimSiamHook", None)
    if old is None:
        return {}
    given = old.table("paramwise_options")
    parameters = trained(plain(recipe["model"])) if "model" in recipe else None
    rules = rules_0x(given, parameters) if given is not None else []
    if cfg is not None:
        rules += rules_1x(cfg, parameters)
        cfg.finish("[[optimizer.paramwise]] has nothing like it")
    fix_rates(rules, hook, old)
    listed = paramwise(rules, parameters, old)
    if value_at(recipe, "model", "freeze_prototypes_iters") is not None:
        frozen = {"match": r"^head\.prototypes\.", "freeze_iters": "${model.freeze_prototypes_iters}"}
        listed.append(node(frozen, old.where))
    made = {} if clip is None else {"grad_clip": clip}
    converted = optimizer(old, made | ({"paramwise": node(listed, old.where)} if listed else {}))
    return {} if converted is None else {"optimizer": converted}


def _clip(options: OldTable | None, is_wrapper: bool) -> Node | None:
    grad_clip = options.table("clip_grad" if is_wrapper else "grad_clip") if options is not None else None
    return clipping(grad_clip) if grad_clip is not None else None


def _leave_options(options: OldTable, is_wrapper: bool) -> None:
    """What the wrapper of 1.x or the hook of 0.x has besides: mixed precision and communication."""
    if is_wrapper:
        options.expect_type("there is no such wrapper here", "OptimWrapper", "AmpOptimWrapper", "ApexOptimWrapper")
        options.lose("constructor", "layer-wise rates and the like are [[optimizer.paramwise]], rule by rule")
    else:
        options.expect_type("there is no such hook here", *_OPTIMIZER_HOOKS)
    options.leave(_LEFT["fp16"], "loss_scale", "dtype", "use_fp16")
    options.leave("gradients are summed over ranks by the engine", "coalesce", "bucket_size_mb", "distributed")
    options.finish("[optimizer] has nothing like it")


def _learning_rate(top: OldTable, recipe: Part, accumulation: int) -> Part:
    schedulers = top.tables("param_scheduler")
    if schedulers:
        epochs, steps = value_at(recipe, "epochs"), value_at(recipe, "max_iters")
        made = schedule.param_scheduler(schedulers, epochs, steps and steps * accumulation, accumulation)
    else:
        config = top.table("lr_config")
        made = schedule.lr_config(config, accumulation) if config is not None else None
    top.lose("momentum_config", "the optimizer's momentum follows no schedule here")
    return {} if made is None else {"lr": made}


def _validation(top: OldTable, has_holdout: bool) -> Part:
    """`workflow`: training, or training and validation in turn."""
    interval = validation_interval(top)
    workflow = top.take("workflow")
    if workflow is not None and interval is not None and has_holdout:
        return {"monitor": node({"loss_interval": interval}, workflow.where)}
    if workflow is not None and plain(workflow) != [["train", 1]]:
        text = "a run trains, and monitor.loss_interval measures the loss on data.holdout beside it"
        top.report.lost(workflow.where, ("workflow",), text)
    return {}


def _saving(top: OldTable, accumulation: int) -> Part:
    """`[checkpoint]` and `[log]`."""
    made: Part = {}
    log: Part = {}
    defaults = top.table("default_hooks")
    config = top.table("checkpoint_config") if defaults is None else defaults.table("checkpoint")
    if config is not None:
        made["checkpoint"] = node(runtime.checkpoints(config, accumulation), config.where)
    logs = top.table("log_config") if defaults is None else defaults.table("logger")
    if logs is not None:
        log |= (runtime.log_0x if defaults is None else runtime.log_1x)(logs, accumulation)
    if defaults is not None:
        for key, title in _USUAL_HOOKS.items():
            defaults.expect(key, {"type": title}, "the training loop does it, without options")
        defaults.finish("there is no such hook here")
    visualizer = top.table("visualizer")
    log |= runtime.visualizer(visualizer) if visualizer is not None else {}
    level = top.take("log_level", "a string")
    if level is not None:
        log["level"] = level
    if log:
        made["log"] = node(log, top.where)
    imports = top.take("custom_imports")
    if imports is not None:
        text = "modules for MMSelfSup's registries; custom_imports here names modules with classes of sslrun's"
        top.report.lost(imports.where, ("custom_imports",), text)
    return made
