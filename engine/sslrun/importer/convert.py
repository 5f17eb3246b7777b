"""Converts an old config as a whole: which old table becomes which table of the recipe."""

from sslrun.importer import runtime
from sslrun.importer.images import Images, images_0x, images_1x
from sslrun.importer.methods import Around, model
from sslrun.importer.old import Effect, OldTable, node
from sslrun.importer.optimizer import clipping, optimizer, paramwise
from sslrun.importer.ours import Part, present, value_at
from sslrun.importer.schedule import lr_config, param_scheduler

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
    count = options.first(*names, kind="a whole number")
    accumulation = count.value if count is not None and count.value > 0 else 1
    images = _images(top)
    hooks = _hooks(top)
    made = runtime.length(top, accumulation) | runtime.batch(top, name, gpus, accumulation, images) | runtime.start(top)
    if old := top.table("model"):
        around = Around(hooks, options.table("frozen_layers_cfg"), accumulation, images.num_views)
        made |= present(model=model(old, around))
    if images.part:
        made["data"] = node(images.part, top.where)
    made |= _optimizer(top, options, hooks, made)
    made |= _learning_rate(top, made, accumulation)
    made |= runtime.saving(top, accumulation)
    _imports(top)
    for title, hook in hooks.items():
        hook.give_up(f"there is no hook {title or 'without a type'} here")
    return made


def _images(top: OldTable) -> Images:
    if loader := top.table("train_dataloader"):
        own = top.rest["model"].value.get("data_preprocessor") if isinstance(top.peek("model"), dict) else None
        if own is None or not isinstance(own.value, dict):
            return images_1x(loader, top.table("data_preprocessor"))
        top.leave("the model has one of its own", "data_preprocessor")
        return images_1x(loader, OldTable(own, ("model", "data_preprocessor"), top.report, top.framework))
    data = top.table("data")
    return images_0x(data, top) if data else Images({}, None, None)


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


def _optimizer(top: OldTable, options: OldTable, hooks: dict[str, OldTable], recipe: Part) -> Part:
    """Converts `[optimizer]`, which stands in the wrapper of 1.x, or beside the hook of 0.x."""
    is_wrapper = options.key == ("optim_wrapper",)
    old = (options if is_wrapper else top).table("optimizer")
    made = clipping(options.table("clip_grad" if is_wrapper else "grad_clip"))
    hook = hooks.pop("SimSiamHook", None)
    custom = options.table("paramwise_cfg").table("custom_keys")
    if not old:
        return {}
    listed = paramwise(old.table("paramwise_options") or custom, old, recipe.get("model"), hook)
    if value_at(recipe, "model", "freeze_prototypes_iters") is not None:
        frozen = {"match": r"^head\.prototypes\.", "freeze_iters": "${model.freeze_prototypes_iters}"}
        listed.append(node(frozen, old.where))
    return present(optimizer=optimizer(old, made | ({"paramwise": node(listed, old.where)} if listed else {})))


def _learning_rate(top: OldTable, recipe: Part, accumulation: int) -> Part:
    schedulers = top.tables("param_scheduler")
    if schedulers:
        epochs, steps = value_at(recipe, "epochs"), value_at(recipe, "max_iters")
        return present(lr=param_scheduler(schedulers, epochs, steps and steps * accumulation, accumulation))
    config = top.table("lr_config")
    return present(lr=lr_config(config, accumulation)) if config else {}


def _imports(top: OldTable) -> None:
    """Reports `custom_imports`: only modules of the frameworks themselves are not missed."""
    imports = top.take("custom_imports")
    modules = value_at(imports, "imports")
    listed = modules if isinstance(modules, list) else [modules]
    if imports is not None and all(str(module).partition(".")[0] in _PACKAGES for module in listed):
        why = "the old framework's own modules, whose classes are known here"
        top.report.add(Effect.LEFT, imports.where, ("custom_imports",), why)
    elif imports is not None:
        why = "modules for the old registries; custom_imports here names modules with classes of sslrun's"
        top.lost(why, "custom_imports", at=imports)
