"""Converts an old config as a whole: which old table becomes which table of the recipe."""

from sslrun.config.node import Node
from sslrun.importer import runtime
from sslrun.importer.images import images_0x, images_1x
from sslrun.importer.masked import with_ratio
from sslrun.importer.methods import model
from sslrun.importer.old import OldTable, node
from sslrun.importer.optimizer import clipping, optimizer, paramwise
from sslrun.importer.ours import Part, value_at
from sslrun.importer.schedule import lr_config, param_scheduler

_PACKAGES = ("openselfsup", "mmselfsup", "mmpretrain", "mmcls", "mmcv", "mmengine")
_PASSES = ("update_interval", "cumulative_iters", "accumulative_counts", "accumulative_iters")


def convert(top: OldTable, name: str, gpus: int | None) -> dict[str, Node]:
    """Returns the recipe, as far as the old config could be converted; other keys stay in the old table.

    Args:
        top: the old config.
        name: of the old file, without `.py`.
        gpus: number of GPUs that the batch is for, where the user says so.
    """
    options = top.table("optim_wrapper" if "optim_wrapper" in top else "optimizer_config")
    passes = options.first(*_PASSES, kind="a whole number")
    top.report.accumulation = max(passes.value, 1) if passes is not None else 1
    data = _data(top)
    hooks = _hooks(top)
    made = runtime.length(top) | runtime.batch(top, name, gpus, data) | runtime.start(top)
    if old := top.table("model"):
        backbone, is_mae = old.rest.get("backbone"), str(old.peek("type")).rpartition(".")[2] == "MAE"
        if is_mae and backbone is not None and isinstance(backbone.value, dict):
            sides = backbone.value.get("patch_size"), backbone.value.get("mask_ratio")
            with_ratio(data, sides[1] or node(0.75, backbone.where), value_at({"side": sides[0]}, "side") or 16)
        counts = [value_at(view, "num_views") for view in data.get("views") or ()]
        num_views = sum(counts) if counts and all(isinstance(count, int) for count in counts) else None
        made["model"] = model(old, hooks, options.table("frozen_layers_cfg"), num_views)
    made["data"] = {key: value for key, value in data.items() if value is not None} or None
    made |= _optimizer(top, options, hooks.pop("SimSiamHook", None), made.get("model"))
    if schedulers := top.tables("param_scheduler"):
        iterations = (value_at(made, "max_iters") or 0) * top.report.accumulation or None
        made["lr"] = param_scheduler(schedulers, value_at(made, "epochs"), iterations)
    elif config := top.table("lr_config"):
        made["lr"] = lr_config(config)
    made |= runtime.saving(top)
    _imports(top)
    for title, hook in hooks.items():
        hook.give_up(f"there is no hook {title or 'without a type'} here")
    return {key: node(value, top.where) for key, value in made.items() if value is not None}


def _data(top: OldTable) -> Part:
    """Converts the images; a `data_preprocessor` stands in the model, or beside it."""
    if loader := top.table("train_dataloader"):
        own = top.rest["model"].value.get("data_preprocessor") if isinstance(top.peek("model"), dict) else None
        if own is None or not isinstance(own.value, dict):
            return images_1x(loader, top.table("data_preprocessor"))
        top.leave("the model has one of its own", "data_preprocessor")
        return images_1x(loader, OldTable(own, ("model", "data_preprocessor"), top.report, top.framework))
    data = top.table("data")
    return images_0x(data, top) if data else {}


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


def _optimizer(top: OldTable, options: OldTable, hook: OldTable | None, model: Node | None) -> Part:
    """Converts `[optimizer]`, which stands in the wrapper of 1.x, or beside the hook of 0.x."""
    is_wrapper = options.key == ("optim_wrapper",)
    old = (options if is_wrapper else top).table("optimizer")
    made = clipping(options.table("clip_grad" if is_wrapper else "grad_clip"))
    custom = options.table("paramwise_cfg").table("custom_keys")
    if not old:
        return {}
    rules = paramwise(old.table("paramwise_options") or custom, old, model, hook)
    if value_at(model, "freeze_prototypes_iters") is not None:
        rules.append({"match": r"^head\.prototypes\.", "freeze_iters": "${model.freeze_prototypes_iters}"})
    return {"optimizer": optimizer(old, made | {"paramwise": rules or None})}


def _imports(top: OldTable) -> None:
    """Reports `custom_imports`: only modules of the frameworks themselves are not missed."""
    modules = value_at(top.rest, "custom_imports", "imports")
    listed = modules if isinstance(modules, list) else [modules]
    if all(str(module).partition(".")[0] in _PACKAGES for module in listed):
        top.leave("the old framework's own modules, whose classes are known here", "custom_imports")
    elif top.take("custom_imports") is not None:
        why = "modules for the old registries; custom_imports here names modules with classes of sslrun's"
        top.lost(why, "custom_imports")
