"""Runs the monitors of a recipe: checks what they need, and extracts features once for all that are due."""

import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch

from sslrun.contract import Batch, Progress
from sslrun.errors import UsageError
from sslrun.evaluation.features import FeatureExtractor, evenly
from sslrun.evaluation.monitors.config import MonitorConfig
from sslrun.evaluation.monitors.monitor import ImageSet, Snapshot
from sslrun.runtime.executor import Executor
from sslrun.runtime.stopping import stoppable

logger = logging.getLogger("sslrun")


class Monitors:
    """The monitors of a run.

    Args:
        config: the `[monitor]` table.
        training: extracts features of training images.
        held_out: extracts features of held-out images; None if there are none. Monitors that need held-out images are
            then left out, and so are monitors that need labels if a source has none, each time with a warning.
        held_out_batches: see `Snapshot`.

    """

    def __init__(
        self,
        config: MonitorConfig,
        training: FeatureExtractor,
        held_out: FeatureExtractor | None = None,
        held_out_batches: Callable[[], Iterator[list[Batch]]] | None = None,
    ) -> None:
        self.config, self.training, self.held_out, self.held_out_batches = config, training, held_out, held_out_batches
        self.monitors = config.monitors()
        if held_out is None:
            missing = [key for key, monitor in self.monitors.items() if monitor.needs_held_out]
            self.monitors = {key: monitor for key, monitor in self.monitors.items() if key not in missing}
            if missing:
                keys = ", ".join(missing)
                logger.warning("[monitor] %s: there are no held-out images (data.holdout) to measure", keys)
        sources = [extractor.source for extractor in (training, held_out) if extractor is not None]
        unlabeled = next((source for source in sources if source.labels is None), None)
        if unlabeled is not None:
            missing = [key for key, monitor in self.monitors.items() if monitor.needs_labels]
            self.monitors = {key: monitor for key, monitor in self.monitors.items() if key not in missing}
            if missing:
                logger.warning("[monitor] %s: left out, since %r has no labels", ", ".join(missing), unlabeled)

    def measure(self, executor: Executor, progress: Progress) -> dict[str, float]:
        """The numbers of all monitors that are due before the step of `progress`, by name. All ranks call it.

        Raises:
            Stopped: the run was asked to stop; nothing has changed.
            UsageError: a monitor returns something that is not a number, or a name that is not its own.
        """
        due = {k: each for k, each in self.monitors.items() if self.config.is_due(each.interval, progress)}
        if not due:
            return {}
        snapshot = self._snapshot(executor, progress)
        device = executor.device
        measured: dict[str, float] = {}
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for key, monitor in stoppable(due.items()):
                numbers = monitor.measure(snapshot)
                place = f"{type(monitor).__name__} (monitor.{key.removesuffix('.interval')})"
                _check(numbers, measured, place)
                measured |= numbers
        return measured

    def _snapshot(self, executor: Executor, progress: Progress) -> Snapshot:
        backbone = executor.method.backbone
        bank = evenly(len(self.training.source), self.config.knn_bank)
        training, held_out = ImageSet(self.training, bank, backbone), None
        if self.held_out is not None:
            everything = np.arange(len(self.held_out.source), dtype=np.int64)
            held_out = ImageSet(self.held_out, everything, backbone)
        return Snapshot(executor, progress, training, held_out, self.held_out_batches)


def _check(numbers: dict[str, float], others: dict[str, float], place: str) -> None:
    """Raises UsageError for what a row of metrics.jsonl cannot hold."""
    for name, value in numbers.items():
        if not isinstance(value, int | float):
            raise UsageError(f"{place} returns a {type(value).__name__} as {name!r}, expected a Python number")
        if "/" not in name:
            raise UsageError(f"{place} returns {name!r}, expected a name of the form group/name")
        if name in others:
            raise UsageError(f"{place} returns {name!r}, which another monitor has measured too")
