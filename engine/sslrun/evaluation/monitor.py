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
        transforms: how pictures are prepared; where it is not given, a centre crop of the first view's size.
        collapse: what to do when the embeddings of different pictures become equal.
    """

    by: Literal["epoch", "iter"] = "epoch"
    loss_interval: int = 0
    knn_interval: int = 0
    knn_k: int = 20
    knn_temperature: float = 0.07
    knn_bank: int = 20000
    transforms: list[Transform] | None = None
    collapse: Literal["warn", "stop"] = "warn"

    def __post_init__(self) -> None:
        for name, least in (("loss_interval", 0), ("knn_interval", 0), ("knn_k", 1), ("knn_bank", 1)):
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


def _labels(source: Source, ids: np.ndarray) -> Tensor:
    if source.labels is None:
        raise UsageError(f"monitor.knn_interval needs labels, but {source!r} has none; set it to 0")
    return torch.from_numpy(source.labels[ids].astype(np.int64))
