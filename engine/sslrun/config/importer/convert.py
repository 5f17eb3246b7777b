"""An old configuration as a recipe of ours: which old table becomes which new one, and what is left over."""

import re

from sslrun.config.importer import runtime, schedule
from sslrun.config.importer.files import kind_of
from sslrun.config.importer.methods import frozen_prototypes, model
from sslrun.config.importer.optimizer import clipping, optimizer, paramwise, rules_0x, rules_1x
from sslrun.config.importer.parameters import trained
from sslrun.config.importer.parts import Part, node, value_at
from sslrun.config.importer.pictures import Pictures, pictures_0x, pictures_1x
from sslrun.config.importer.table import OldTable
from sslrun.config.node import Node, plain

_BATCH = re.compile(r"(?:^|[_-])(\d{1,5})xb(\d{1,6})(?:[_-]|$)")

_ENGINE = "machines are [engine]'s business, ranks the launcher's"
_THREADS = "pictures are decoded by threads, data.workers_per_gpu of them"
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
}


def convert(top: OldTable, name: str, gpus: int | None) -> Part:
    """The recipe, as far as it could be converted; what nothing takes stays in the old table.

    Args:
        top: the old configuration.
        name: of the old file, without `.py`.
        gpus: number of GPUs that the batch is for, where the user says so.
    """
    inverse_momentum = top.peek("default_scope") == "mmpretrain"
    wrapper = top.table("optim_wrapper")
    options = wrapper if wrapper is not None else top.table("optimizer_config")
    accumulation = _accumulation(options)
    pictures = _pictures(top)
    hooks = _hooks(top)
    made: Part = _length(top, accumulation)
    batch = _batch(top, name, gpus, accumulation, pictures)
    made |= {key: batch[key] for key in ("global_batch",) if key in batch}
    made |= _run(top)
    old_model = top.table("model")
    if old_model is not None:
        converted = model(old_model, hooks, accumulation, pictures.num_views, inverse_momentum)
        made |= {"model": converted} if converted is not None else {}
    if pictures.part:
        made["data"] = node(pictures.part, top.where)
    made |= _optimizer(top, wrapper, options, hooks, accumulation, made)
    made |= _learning_rate(top, made, accumulation)
    if "micro_batch" in batch:
        made["engine"] = node({"micro_batch": batch["micro_batch"]}, top.where)
    made |= _saving(top, accumulation)
    for title, hook in hooks.items():
        hook.report.lost(hook.where, hook.key, f"there is no hook {title or 'without a type'} here")
    for key, why in _LEFT.items():
        top.leave(why, key)
    return made


def _accumulation(options: OldTable | None) -> int:
    """Backward passes for one optimiser step."""
    names = ("update_interval", "cumulative_iters", "accumulative_counts", "accumulative_iters")
    count = options.first(*names, kind="a whole number") if options is not None else None
    return count.value if count is not None and count.value > 0 else 1


def _pictures(top: OldTable) -> Pictures:
    preprocessor = top.table("data_preprocessor")
    old_model = top.rest.get("model")
    if old_model is not None and isinstance(old_model.value, dict) and "data_preprocessor" in old_model.value:
        own = old_model.value["data_preprocessor"]
        if isinstance(own.value, dict):
            preprocessor = OldTable(own, ("model", "data_preprocessor"), top.report)
    loader = top.table("train_dataloader")
    if loader is not None:
        return pictures_1x(loader, preprocessor)
    data = top.table("data")
    return pictures_0x(data, top) if data is not None else Pictures({}, None, None)


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
    made: Part = {}
    for key in ("runner", "train_cfg"):
        table = top.table(key)
        if table is not None:
            made = runtime.length(table, accumulation)
    total = top.take("total_epochs", "a whole number")  # of OpenSelfSup
    return made or ({} if total is None else {"epochs": total})


def _batch(top: OldTable, name: str, gpus: int | None, accumulation: int, pictures: Pictures) -> Part:
    """`global_batch`, and what is at once on a device where it is made of several passes."""
    named = _BATCH.search(name)
    ids, scaling = top.take("gpu_ids", "a list"), top.table("auto_scale_lr")
    total = scaling.get("base_batch_size", "a whole number") if scaling is not None else None
    if scaling is not None:
        scaling.expect("enable", False, "a learning rate belongs to a batch here: nothing scales it")
        scaling.finish("there is no such option here")
    samples = pictures.samples_per_gpu
    if not samples or samples < 1:
        return {}
    where = pictures.part["samples_per_gpu"].where
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


def _optimizer(
    top: OldTable,
    wrapper: OldTable | None,
    options: OldTable | None,
    hooks: dict[str, OldTable],
    accumulation: int,
    made: Part,
) -> Part:
    found: Part = {}
    clip = None
    if options is not None:
        grad_clip = options.table("clip_grad" if wrapper is not None else "grad_clip")
        clip = clipping(grad_clip) if grad_clip is not None else None
        frozen = options.table("frozen_layers_cfg")
        if frozen is not None:
            prototypes = frozen_prototypes(frozen, str(value_at(made, "model", "type")), accumulation)
            if prototypes:
                found["model"] = Node({**made["model"].value, **prototypes}, made["model"].origins)
    old = wrapper.table("optimizer") if wrapper is not None else top.table("optimizer")
    cfg = wrapper.table("paramwise_cfg") if wrapper is not None else None
    if wrapper is not None:
        wrapper.expect_type("there is no such wrapper here", "OptimWrapper", "AmpOptimWrapper", "ApexOptimWrapper")
        wrapper.leave(_LEFT["fp16"], "loss_scale", "dtype", "use_fp64")
        wrapper.lose("constructor", "layer-wise rates and the like are [[optimizer.paramwise]], rule by rule")
        wrapper.finish("[optimizer] has nothing like it")
    elif options is not None:
        options.expect_type("there is no such hook here", *_OPTIMIZER_HOOKS)
        options.leave(_LEFT["fp16"], "loss_scale", "use_fp16")
        options.leave("gradients are summed over ranks by the engine", "coalesce", "bucket_size_mb", "distributed")
        options.finish("[optimizer] has nothing like it")
    hook = hooks.pop("SimSiamHook", None)
    if old is None:
        return found
    given = old.table("paramwise_options")
    title = str(old.peek("type")).rpartition(".")[2]
    parameters = trained(plain(made["model"])) if "model" in made else None
    rules = rules_0x(given, parameters) if given is not None else []
    if cfg is not None:
        rules += rules_1x(cfg, parameters)
        cfg.finish("[[optimizer.paramwise]] has nothing like it")
    fixed = hook.get("fix_pred_lr", "true or false", True) if hook is not None else False
    fixed_lr = hook.take("lr", "a number") if hook is not None else None
    for rule in rules:
        if "fix_lr" in rule.options and not fixed:
            text = "without SimSiamHook nothing there fixes the rate"
            top.report.lost(rule.options.pop("fix_lr").where, (*rule.key, "fix_lr"), text)
        elif "fix_lr" in rule.options and fixed_lr is not None and fixed_lr.value != old.peek("lr"):
            rule.options["lr"] = fixed_lr
    if hook is not None:
        hook.take("adjust_by_epoch")  # how often the rate is put back
        hook.finish("SimSiam has nothing like it here")
    parts: Part = {}
    listed = paramwise(rules, parameters, title, old)
    if "freeze_prototypes_iters" in (found.get("model") or made.get("model") or node({}, top.where)).value:
        frozen_rule = {"match": r"^head\.prototypes\.", "freeze_iters": "${model.freeze_prototypes_iters}"}
        before = listed.value if listed is not None else []
        listed = node([*before, node(frozen_rule, old.where)], old.where)
    if clip is not None:
        parts["grad_clip"] = clip
    if listed is not None:
        parts["paramwise"] = listed
    converted = optimizer(old, parts)
    return found | ({"optimizer": converted} if converted is not None else {})


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


def _saving(top: OldTable, accumulation: int) -> Part:
    """`[checkpoint]` and `[log]`."""
    made: Part = {}
    log: Part = {}
    config, logs = top.table("checkpoint_config"), top.table("log_config")
    defaults = top.table("default_hooks")
    if defaults is not None:
        config, logs_1x = defaults.table("checkpoint") or config, defaults.table("logger")
        log |= runtime.log_1x(logs_1x, accumulation) if logs_1x is not None else {}
        for key, title in _USUAL_HOOKS.items():
            defaults.expect(key, {"type": title}, "the training loop does it, without options")
        defaults.finish("there is no such hook here")
    if config is not None:
        made["checkpoint"] = node(runtime.checkpoints(config, accumulation), config.where)
    if logs is not None:
        log |= runtime.log_0x(logs, accumulation)
    visualizer = top.table("visualizer")
    log |= runtime.visualizer(visualizer) if visualizer is not None else {}
    level = top.take("log_level", "a string")
    if level is not None:
        log["level"] = level
    if log:
        made["log"] = node(log, top.where)
    workflow = top.take("workflow")
    if workflow is not None and plain(workflow) != [["train", 1]]:
        text = f"{kind_of(workflow.value)}: a run trains, and [monitor] measures beside it"
        top.report.lost(workflow.where, ("workflow",), text)
    imports = top.take("custom_imports")
    if imports is not None:
        text = "modules for MMSelfSup's registries; custom_imports here names modules with classes of sslrun's"
        top.report.lost(imports.where, ("custom_imports",), text)
    return made
