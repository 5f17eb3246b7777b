"""Names of MMSelfSup that are unknown here, with hints at ours: keys, and classes of components."""

from sslrun.config.node import Key, Node, lookup

VIEWS = "is written [[data.views]]: one table per group of equal views, with num_views and transforms"
OWN_VARIABLE = "is not a key; a recipe's own variables go into [vars] and are referred to as ${vars.NAME}"

# Old key -> hint. If several old keys fit an unknown key, the longest wins.
RENAMED: dict[Key, str] = {
    ("_base_",): 'is written extends = "path", or a list of paths',
    ("runner",): "is gone: write epochs (or max_iters) at the top level",
    ("runner", "max_epochs"): "is written epochs, at the top level",
    ("runner", "max_iters"): "is written max_iters, at the top level",
    ("lr_config",): "is written [lr]",
    ("lr", "by_epoch"): 'is written lr.by = "epoch" or lr.by = "iter"',
    ("lr", "warmup_by_epoch"): "is gone: the length of the warm-up is written warmup_epochs, or warmup_iters",
    ("lr", "max_lr"): "is gone: the peak of OneCycle is the optimizer's lr, that of its parameter groups included",
    ("checkpoint_config",): "is written [checkpoint]",
    ("checkpoint", "by_epoch"): 'is written checkpoint.by = "epoch" or checkpoint.by = "iter"',
    ("log_config",): "is written [log]",
    ("log_level",): "is written log.level",
    ("optimizer_config",): "is gone: gradient clipping is optimizer.grad_clip",
    ("optimizer_config", "grad_clip"): "is written optimizer.grad_clip",
    ("optimizer", "paramwise_options"): "is written [[optimizer.paramwise]], each with match (a regular expression)",
    ("data", "train"): "is gone: its keys stand in [data] itself, as data.source and [[data.views]]",
    ("data", "train", "data_source"): "is written data.source",
    ("data", "train", "pipelines"): VIEWS,
    ("data", "train", "num_views"): VIEWS,
    ("data", "train", "prefetch"): "is written data.prefetch",
    ("data", "pipelines"): VIEWS,
    ("data", "num_views"): VIEWS,
    ("data", "data_source"): "is written data.source",
    ("dist_params",): "is gone: settings of the machine are in [engine], ranks come from the launcher",
    ("persistent_workers",): "is gone: loader threads live as long as the run; see [engine] and data.prefetch",
    ("prefetch",): "is written data.prefetch",
    ("workflow",): "is gone: the loss on data.holdout every n epochs is monitor.loss_interval = n",
    ("evaluation",): "is written [monitor]: knn_interval, loss_interval",
    ("data_source",): OWN_VARIABLE,
    ("dataset_type",): OWN_VARIABLE,
    ("img_norm_cfg",): OWN_VARIABLE,
    ("train_pipeline",): OWN_VARIABLE,
}

# Kind of `sslrun list` -> class name of MMSelfSup, mmcv or MMEngine, in lower case -> our name. Names that differ only
# in case need no entry.
RENAMED_CLASSES: dict[str, dict[str, str]] = {
    "schedules": {
        "fixed": "Constant",
        "cosine": "CosineAnnealing",
        "linear": "Poly with power = 1",
        "linearannealing": "Poly with power = 1",
        "stepfixcosineannealing": "CosineAnnealing with after_warmup = true",
        "multistep": "Step",
        "multisteplr": "Step",
        "exponentiallr": "Exp",
    },
}


def renamed_class(kind: str, name: str) -> str:
    """A hint for the end of an error about an unknown class; empty if the name is no old name."""
    ours = RENAMED_CLASSES.get(kind, {}).get(name.lower())
    return f"; {name} is {ours} here" if ours else ""


def renamed(key: Key, node: Node) -> str | None:
    """`OLD KEY is written ...` for an unknown key and the keys below it; None if it is no old key."""
    fitting = [old for old in RENAMED if old[: len(key)] == key and lookup(node, old[len(key) :]) is not None]
    if not fitting:
        return None
    old = max(fitting, key=len)
    return f"{'.'.join(map(str, old))} {RENAMED[old]}"
