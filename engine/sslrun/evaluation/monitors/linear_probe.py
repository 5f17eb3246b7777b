"""Accuracy of a linear probe on the held-out images while training."""

from sslrun.evaluation.monitors.monitor import Monitor, Snapshot
from sslrun.evaluation.probe import linear_probe


class LinearProbe(Monitor):
    """Fits a logistic regression to the features of training images and classifies the held-out ones with it.

    It measures `probe/top1_pct` and the cross-entropy `probe/loss`.
    """

    needs_held_out = True
    needs_labels = True

    def measure(self, snapshot: Snapshot) -> dict[str, float]:
        bank, queries = snapshot.training, snapshot.held_out
        return linear_probe(bank.features_share, bank.labels, queries.features_share, queries.labels, bank.device)
