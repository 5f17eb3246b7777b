"""Accuracy of a linear probe on the held-out images during training."""

from sslrun.evaluation.monitors.monitor import Monitor, Snapshot
from sslrun.evaluation.probe import linear_probe


class LinearProbe(Monitor):
    """Classifies the held-out images by a logistic regression on training features: `probe/top1_pct`, `probe/loss`.

    The regression is fitted from scratch at every measurement; `probe/loss` is its cross-entropy on held-out images.
    """

    needs_held_out = True
    needs_labels = True

    def measure(self, snapshot: Snapshot) -> dict[str, float]:
        bank, queries = snapshot.training, snapshot.held_out
        return linear_probe(bank.features_share, bank.labels, queries.features_share, queries.labels, bank.device)
