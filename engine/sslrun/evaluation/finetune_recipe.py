"""The recipe of a fine-tuning run, composed of the encoder's recipe and the `[eval.finetune]` table.

Fine-tuning is an ordinary training run of the method `Supervised`. This file only composes its recipe; the engine
provides everything else (several ranks, precision, exact resume, logs).
"""

from dataclasses import dataclass
from typing import Any

from sslrun.data.transforms import Transform
from sslrun.errors import UsageError
from sslrun.evaluation.evaluation import Evaluation
from sslrun.optim.optimizers import Optimizer
from sslrun.optim.schedules import Schedule

OPTIMIZER = {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.05}
NO_DECAY = {"kind": ["norm", "bias", "embedding"], "weight_decay": 0.0}
SCHEDULE = {"policy": "CosineAnnealing", "by": "iter", "warmup": "linear", "warmup_iters": 100, "warmup_ratio": 1e-3}
METHOD_KEYS = ("init_std", "label_smoothing", "mixup", "cutmix", "drop_path")


@dataclass(frozen=True, kw_only=True)
class Finetune(Evaluation):
    """Trains encoder and classifier together on eval.train and tests them on eval.test, in a separate training run.

    Attributes:
        epochs: length of the training in epochs.
        global_batch: samples per optimizer step over all devices.
        samples_per_gpu: samples of one BatchNorm group.
        optimizer: optimizer and parameter groups; by default AdamW with learning rate 1e-3 and weight decay 0.05, but
            no decay of norms and biases.
        lr: learning-rate schedule; by default a cosine after 100 steps of linear warm-up.
        layer_decay: ratio of a layer's learning rate to that of the layer above it; 1 for equal rates
            (`optimizer.layer_decay` of the training run).
        init_std: standard deviation of the classifier's initial weights.
        label_smoothing: share of the target that is spread evenly over all classes, 0 to below 1.
        mixup: alpha of the Beta distribution of mixup's shares; 0 for no mixup.
        cutmix: alpha of the Beta distribution of CutMix's shares; 0 for no CutMix. If mixup is set too, each pair of
            images gets one of the two.
        drop_path: probability that stochastic depth drops the last residual branch; it rises linearly from 0 at the
            first branch.
        transforms: transforms of a training view; by default a random resized crop of the first view's size and a flip.
        test_interval: epochs between two classifications of the test images; the one after the last epoch is the
            result.
    """

    epochs: int = 50
    global_batch: int = 128
    samples_per_gpu: int = 32
    optimizer: Optimizer | None = None
    lr: Schedule | None = None
    layer_decay: float = 1.0
    init_std: float = 0.01
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    drop_path: float = 0.0
    transforms: list[Transform] | None = None
    test_interval: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1:
            raise UsageError(f"layer_decay must be above 0 and at most 1, not {self.layer_decay}")
        if self.test_interval < 1:
            raise UsageError(f"test_interval must be at least 1, not {self.test_interval}")


def recipe(
    values: dict[str, Any],
    config: Finetune,
    table: dict[str, Any],
    *,
    size: tuple[int, int],
    num_classes: int,
    weights: str,
    work_dir: str,
) -> dict[str, Any]:
    """The resolved recipe of a fine-tuning run.

    Args:
        values: the resolved recipe of the encoder's run, with its `[eval]` table.
        config: how to fine-tune.
        table: the table that `config` was built from.
        size: height and width of the training views if `config` has no transforms.
        num_classes: number of classes.
        weights: path of the encoder's weights.
        work_dir: folder in which the run folder is created.
    """
    evaluation, data = values.get("eval", {}), values["data"]
    monitor = evaluation.get("transforms") or values.get("monitor", {}).get("transforms")
    optimizer = table.get("optimizer", {**OPTIMIZER, "paramwise": [NO_DECAY]})
    reading = ("workers_per_gpu", "augment", "hw_decoder_load", "prefetch", "max_bad_pct")
    kept = {key: data[key] for key in reading if key in data}
    return {
        "epochs": config.epochs,
        "global_batch": config.global_batch,
        "seed": values.get("seed", 0),
        "work_dir": work_dir,
        "load_from": weights,
        "load_strict": False,
        **{key: values[key] for key in ("custom_imports", "engine", "log") if key in values},
        "model": {
            "type": "Supervised",
            "num_classes": num_classes,
            **{key: getattr(config, key) for key in METHOD_KEYS},
            "backbone": values["model"]["backbone"],
        },
        "data": {
            **kept,
            "samples_per_gpu": config.samples_per_gpu,
            **_sources(evaluation, data),
            "views": [{"num_views": 1, "transforms": table.get("transforms") or _crops(data["views"][0], size)}],
        },
        "optimizer": {**optimizer, **({} if config.layer_decay == 1 else {"layer_decay": config.layer_decay})},
        "lr": table.get("lr", SCHEDULE),
        "checkpoint": {"interval": 1, "max_keep_ckpts": 1},
        "monitor": {"accuracy_interval": config.test_interval, **({"transforms": monitor} if monitor else {})},
    }


def _sources(evaluation: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """data.source and data.holdout of the training: eval.train and eval.test, or those of the encoder's run."""
    train, test = evaluation.get("train"), evaluation.get("test")
    if test is not None and train is None and isinstance(data.get("holdout"), float):
        raise UsageError("eval.test is set: set eval.train too, since data.holdout is a share of data.source")
    if train is not None and test is None and isinstance(data.get("holdout"), float):
        raise UsageError("eval.train is set: set eval.test too, since data.holdout is a share of data.source")
    return {"source": train or data["source"], "holdout": test or data["holdout"]}


def _crops(view: dict[str, Any], size: tuple[int, int]) -> list[dict[str, Any]]:
    """A crop, a flip, and the normalization of the encoder's views."""
    normalize = [table for table in view["transforms"] if table["type"] == "Normalize"]
    return [{"type": "RandomResizedCrop", "size": list(size)}, {"type": "RandomHorizontalFlip"}, *normalize]
