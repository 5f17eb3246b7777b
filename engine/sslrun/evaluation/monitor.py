"""What is measured while training, and when. It reads the network and changes nothing about it."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from sslrun.contract import Progress
from sslrun.data import Source
from sslrun.data.transforms import Transform
from sslrun.errors import UsageError
from sslrun.evaluation.features import FeatureExtractor, evenly
from sslrun.evaluation.knn import knn_top1
from sslrun.evaluation.probe import linear_probe
from sslrun.evaluation.spectrum import rankme, spectrum
from sslrun.runtime.executor import Executor

HELD_OUT = ("loss_interval", "knn_interval", "probe_interval", "accuracy_interval")  # of what needs data.holdout


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """The `[monitor]` table: what is measured while training, most of it on held-out images (data.holdout).

    Attributes:
        by: unit of the intervals: "epoch" or "iter" (optimizer steps). What is measured at all is also measured before
            the first step and after the last.
        loss_interval: epochs, or iterations, between two measurements of the method's loss; 0 for none.
        knn_interval: epochs, or iterations, between two k-NN classifications; 0 for none.
        knn_k: neighbors that vote.
        knn_temperature: of the votes' weights.
        knn_bank: most training images whose features are used: k-NN compares the held-out ones with them, the probe
            learns from them, RankMe is theirs.
        probe_interval: epochs, or iterations, between two linear probes, each a logistic regression fitted afresh; 0
            for none.
        rankme_interval: epochs, or iterations, between two measurements of how well the features of training images
            fill their space, RankMe and spread; 0 for none. It needs neither labels nor held-out images.
        accuracy_interval: epochs, or iterations, between two classifications of the held-out images by the method
            itself, where it learns classes of labels (Supervised); 0 for none.
        transforms: how images are prepared; where it is not given, a center crop of the first view's size.
        collapse: what to do when the embeddings of different images become equal.
    """

    by: Literal["epoch", "iter"] = "epoch"
    loss_interval: int = 0
    knn_interval: int = 0
    knn_k: int = 20
    knn_temperature: float = 0.07
    knn_bank: int = 20000
    probe_interval: int = 0
    rankme_interval: int = 0
    accuracy_interval: int = 0
    transforms: list[Transform] | None = None
    collapse: Literal["warn", "stop"] = "warn"

    def __post_init__(self) -> None:
        least = {name: 0 for name in vars(self) if name.endswith("_interval")} | {"knn_k": 1, "knn_bank": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UsageError(f"monitor.{name} must be at least {value}, not {getattr(self, name)}")
        if not self.knn_temperature > 0:
            raise UsageError(f"monitor.knn_temperature must be above 0, not {self.knn_temperature}")

    def is_due(self, interval: int, progress: Progress) -> bool:
        """Whether what has this interval is due before the step of `progress`, or, with no step left, at the end."""
        unit = progress.steps_per_epoch if self.by == "epoch" else 1
        return interval > 0 and (progress.step == progress.total_steps or progress.step % (interval * unit) == 0)


class Monitor(Protocol):
    """Something that is measured while training. It leaves networks, buffers and random state as it found them."""

    def measure(self, executor: Executor, progress: Progress) -> dict[str, float]:
        """What is due before the step of `progress`, by name. All ranks call it."""
        ...


class FeatureMonitor:
    """k-NN, linear probe and RankMe, of features that are extracted once for all that is due.

    Args:
        config: the `[monitor]` table.
        training: features of the training images.
        held_out: features of the held-out images; without them there is RankMe alone.

    Raises:
        UsageError: k-NN or the probe is asked for, and a source has no labels.
    """

    def __init__(self, config: MonitorConfig, training: FeatureExtractor, held_out: FeatureExtractor | None) -> None:
        self.config = config
        self.intervals = {"rankme": config.rankme_interval}
        self.images = [(training, evenly(len(training.source), config.knn_bank))]
        self.labels: list[Tensor] = []
        if held_out is not None:
            self.intervals |= {"knn": config.knn_interval, "probe": config.probe_interval}
            self.images.append((held_out, np.arange(len(held_out.source), dtype=np.int64)))
            classifiers = [name for name in ("knn", "probe") if self.intervals[name]]
            self.labels = [_labels(each.source, ids, classifiers[0]) for each, ids in self.images if classifiers]

    def measure(self, executor: Executor, progress: Progress) -> dict[str, float]:
        """What is due; see `Monitor`."""
        due = {name for name, interval in self.intervals.items() if self.config.is_due(interval, progress)}
        if not due:
            return {}
        method = executor.method
        images = self.images[:1] if due == {"rankme"} else self.images
        return self._of(due, *(extractor.extract_share(method.backbone, ids) for extractor, ids in images))

    def _of(self, due: set[str], bank: Tensor, queries: Tensor | None = None) -> dict[str, float]:
        device, config = self.images[0][0].device, self.config
        measured: dict[str, float] = {}
        if queries is not None:
            labeled = bank, self.labels[0], queries, self.labels[1]
            if "knn" in due:
                measured["knn/top1_pct"] = knn_top1(
                    *labeled, k=config.knn_k, temperature=config.knn_temperature, device=device
                )
            if "probe" in due:
                measured |= linear_probe(*labeled, device)
        if "rankme" in due:
            values, feature_std = spectrum(bank, device)
            measured |= {"spectrum/rankme": rankme(values), "spectrum/feature_std": feature_std}
        return measured


class AccuracyMonitor:
    """Classifies held-out images by what the method learns of labels, where it does.

    Args:
        config: the `[monitor]` table.
        held_out: scores of the held-out images.

    Raises:
        UsageError: they have no labels.
    """

    def __init__(self, config: MonitorConfig, held_out: FeatureExtractor) -> None:
        self.config, self.held_out = config, held_out
        self.ids = np.arange(len(held_out.source), dtype=np.int64)
        self.labels = _labels(held_out.source, self.ids, "accuracy")

    def measure(self, executor: Executor, progress: Progress) -> dict[str, float]:
        """Per cent of held-out images whose class has the highest score, or one of the five highest."""
        method = executor.method
        if not self.config.is_due(self.config.accuracy_interval, progress) or (predictor := method.predictor()) is None:
            return {}
        scores = self.held_out.extract(predictor, self.ids)
        best = scores.topk(min(5, scores.shape[1]), dim=1).indices
        hits = best == self.labels.unsqueeze(1)
        top1, top5 = (100 * hits[:, :count].any(dim=1).float().mean().item() for count in (1, 5))
        return {"test/top1_pct": top1, **({"test/top5_pct": top5} if scores.shape[1] > 5 else {})}


def _labels(source: Source, ids: np.ndarray, name: str) -> Tensor:
    if source.labels is None:
        raise UsageError(f"monitor.{name}_interval needs labels, but {source!r} has none; set it to 0")
    return torch.from_numpy(source.labels[ids].astype(np.int64))
