"""Accuracy on the held-out images of a method that learns from labels."""

from sslrun.contract import Method
from sslrun.errors import UsageError
from sslrun.evaluation.monitors.monitor import Monitor, Snapshot


class LabelAccuracy(Monitor):
    """Classifies the held-out images with the method's own classifier (Supervised): `test/top1_pct`.

    With more than 5 classes it also measures `test/top5_pct`.
    """

    needs_held_out = True
    needs_labels = True

    def check(self, method: Method, key: str) -> None:
        if method.predictor() is None:
            raise UsageError(f"{key} is set, but {type(method).__name__} does not learn from labels; set it to 0")

    def measure(self, snapshot: Snapshot) -> dict[str, float]:
        predictor = snapshot.method.predictor()
        assert predictor is not None, "see `check`"
        scores = snapshot.held_out.outputs(predictor)
        best = scores.topk(min(5, scores.shape[1]), dim=1).indices
        hits = best == snapshot.held_out.labels.unsqueeze(1)
        top1, top5 = (100 * hits[:, :count].any(dim=1).float().mean().item() for count in (1, 5))
        return {"test/top1_pct": top1, **({"test/top5_pct": top5} if scores.shape[1] > 5 else {})}
