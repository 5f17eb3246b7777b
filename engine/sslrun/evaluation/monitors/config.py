"""The `[monitor]` table: which monitors run, and how often."""

from dataclasses import dataclass, field
from typing import Literal

from sslrun.contract import Progress
from sslrun.data.transforms import Transform
from sslrun.errors import UsageError
from sslrun.evaluation.monitors.feature_spectrum import FeatureSpectrum
from sslrun.evaluation.monitors.held_out_loss import HeldOutLoss
from sslrun.evaluation.monitors.knn_accuracy import KnnAccuracy
from sslrun.evaluation.monitors.label_accuracy import LabelAccuracy
from sslrun.evaluation.monitors.linear_probe import LinearProbe
from sslrun.evaluation.monitors.monitor import Monitor


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """The `[monitor]` table: what is measured during training, mostly on held-out images (data.holdout).

    Attributes:
        by: unit of all intervals: "epoch" or "iter" (optimizer steps). Every monitor with an interval also measures
            before the first step and after the last.
        loss_interval: epochs (or iterations) between two measurements of the method's loss on held-out images; 0 for
            none.
        knn_interval: epochs (or iterations) between two k-NN classifications of the held-out images; 0 for none.
        knn_k: number of nearest training images that vote in the k-NN classification.
        knn_temperature: temperature of the k-NN votes; a vote weighs exp(cosine / temperature).
        knn_bank: largest number of training images whose features the monitors use: as neighbors in k-NN, to train the
            probe, and for RankMe.
        probe_interval: epochs (or iterations) between two linear probes, each a logistic regression fitted from
            scratch; 0 for none.
        rankme_interval: epochs (or iterations) between two measurements of the training features' RankMe and standard
            deviation; 0 for none. They need neither labels nor held-out images.
        accuracy_interval: epochs (or iterations) between two classifications of the held-out images by the method
            itself, if it learns from labels (Supervised); 0 for none.
        extra: further monitors, including your own: a table `[[monitor.extra]]` with a `type` and an `interval` for
            each.
        transforms: how images are prepared for measurements; by default a center crop of the first view's size.
        collapse: reaction when the embeddings of different images become equal: "warn", or "stop" the run.
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
    extra: list[Monitor] = field(default_factory=list)
    transforms: list[Transform] | None = None
    collapse: Literal["warn", "stop"] = "warn"

    def __post_init__(self) -> None:
        least = {name: 0 for name in vars(self) if name.endswith("_interval")} | {"knn_k": 1, "knn_bank": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UsageError(f"monitor.{name} must be at least {value}, not {getattr(self, name)}")
        if not self.knn_temperature > 0:
            raise UsageError(f"monitor.knn_temperature must be above 0, not {self.knn_temperature}")

    def monitors(self) -> dict[str, Monitor]:
        """Every monitor with an interval above 0, by the key of this table that sets its interval."""
        built_in: dict[str, Monitor] = {
            "loss_interval": HeldOutLoss(self.loss_interval),
            "knn_interval": KnnAccuracy(self.knn_interval, self.knn_k, self.knn_temperature),
            "probe_interval": LinearProbe(self.probe_interval),
            "rankme_interval": FeatureSpectrum(self.rankme_interval),
            "accuracy_interval": LabelAccuracy(self.accuracy_interval),
        }
        extra = {f"extra.{index}.interval": monitor for index, monitor in enumerate(self.extra)}
        return {key: monitor for key, monitor in (built_in | extra).items() if monitor.interval}

    def is_due(self, interval: int, progress: Progress) -> bool:
        """Whether a monitor with this interval is due before the step of `progress`, or at the end of the run."""
        unit = progress.steps_per_epoch if self.by == "epoch" else 1
        return interval > 0 and (progress.step == progress.total_steps or progress.step % (interval * unit) == 0)
