"""What is measured while training: k-NN on held-out pictures. Reads the network; changes nothing about it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sslrun.data import Source
from sslrun.data.transforms import Transform
from sslrun.errors import UsageError
from sslrun.evaluation.features import FeatureExtractor
from sslrun.evaluation.knn import knn_top1


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """The `[monitor]` table: what is measured on pictures that are not trained on (data.holdout).

    Attributes:
        by: unit of the intervals: "epoch" or "iter" (optimiser steps). What is measured at all is also measured before
            the first step and after the last.
        loss_interval: epochs, or iterations, between two measurements of the method's loss; 0 for none.
        knn_interval: epochs, or iterations, between two k-NN classifications; 0 for none.
        knn_k: neighbours that vote.
        knn_temperature: of the votes' weights.
        knn_bank: most training pictures that the held-out ones are compared with.
        accuracy_interval: epochs, or iterations, between two classifications of the held-out pictures by the method
            itself, where it learns classes of labels (Supervised); 0 for none.
        transforms: how pictures are prepared; where it is not given, a centre crop of the first view's size.
        collapse: what to do when the embeddings of different pictures become equal.
    """

    by: Literal["epoch", "iter"] = "epoch"
    loss_interval: int = 0
    knn_interval: int = 0
    knn_k: int = 20
    knn_temperature: float = 0.07
    knn_bank: int = 20000
    accuracy_interval: int = 0
    transforms: list[Transform] | None = None
    collapse: Literal["warn", "stop"] = "warn"

    def __post_init__(self) -> None:
        least_of = {"loss_interval": 0, "knn_interval": 0, "knn_k": 1, "knn_bank": 1, "accuracy_interval": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise UsageError(f"monitor.{name} must be at least {least}, not {getattr(self, name)}")
        if not self.knn_temperature > 0:
            raise UsageError(f"monitor.knn_temperature must be above 0, not {self.knn_temperature}")

    def is_due(self, interval: int, step: int, steps_per_epoch: int, total_steps: int) -> bool:
        """Whether what has this interval is due after so many optimiser steps."""
        unit = steps_per_epoch if self.by == "epoch" else 1
        return interval > 0 and (step == total_steps or step % (interval * unit) == 0)


class KnnMonitor:
    """Classifies held-out pictures by their nearest training pictures.

    Args:
        config: the `[monitor]` table.
        training: features of the training pictures.
        held_out: features of the held-out pictures.

    Raises:
        UsageError: one of the sources has no labels.
    """

    def __init__(self, config: MonitorConfig, training: FeatureExtractor, held_out: FeatureExtractor) -> None:
        self.config, self.extractors = config, (training, held_out)
        bank_size = min(config.knn_bank, len(training.source))
        self.ids = (
            np.linspace(0, len(training.source) - 1, bank_size).astype(np.int64),
            np.arange(len(held_out.source), dtype=np.int64),
        )
        self.bank_labels, self.query_labels = (
            _labels(extractor.source, ids) for extractor, ids in zip(self.extractors, self.ids, strict=True)
        )

    def top1_pct(self, backbone: nn.Module) -> float:
        """Per cent of held-out pictures whose neighbours vote for their class. All ranks call it and share the work."""
        pairs = zip(self.extractors, self.ids, strict=True)
        bank, queries = (extractor.extract_share(backbone, ids) for extractor, ids in pairs)
        config = self.config
        return knn_top1(
            bank,
            self.bank_labels,
            queries,
            self.query_labels,
            k=config.knn_k,
            temperature=config.knn_temperature,
            device=self.extractors[0].device,
        )


class AccuracyMonitor:
    """Classifies held-out pictures by what the method learns of labels.

    Args:
        held_out: scores of the held-out pictures.

    Raises:
        UsageError: they have no labels.
    """

    def __init__(self, held_out: FeatureExtractor) -> None:
        self.held_out = held_out
        self.ids = np.arange(len(held_out.source), dtype=np.int64)
        self.labels = _labels(held_out.source, self.ids, "accuracy_interval")

    def measure(self, predictor: nn.Module) -> dict[str, float]:
        """Per cent of held-out pictures whose class has the highest score, or one of the five highest. All ranks call
        it and share the work."""
        scores = self.held_out.extract(predictor, self.ids)
        best = scores.topk(min(5, scores.shape[1]), dim=1).indices
        hits = best == self.labels.unsqueeze(1)
        top1, top5 = (100 * hits[:, :count].any(dim=1).float().mean().item() for count in (1, 5))
        return {"test/top1_pct": top1, **({"test/top5_pct": top5} if scores.shape[1] > 5 else {})}


def _labels(source: Source, ids: np.ndarray, key: str = "knn_interval") -> Tensor:
    if source.labels is None:
        raise UsageError(f"monitor.{key} needs labels, but {source!r} has none; set it to 0")
    return torch.from_numpy(source.labels[ids].astype(np.int64))
