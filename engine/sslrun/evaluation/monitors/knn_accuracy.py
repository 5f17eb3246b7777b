"""k-NN accuracy on the held-out images during training."""

from sslrun.evaluation.knn import knn_top1
from sslrun.evaluation.monitors.monitor import Monitor, Snapshot
from sslrun.runtime.run_files import KNN


class KnnAccuracy(Monitor):
    """Classifies the held-out images by their nearest training images: `knn/top1_pct`.

    Args:
        k: number of nearest training images that vote.
        temperature: temperature of the votes; a vote weighs exp(cosine / temperature).
    """

    needs_held_out = True
    needs_labels = True

    def __init__(self, interval: int = 1, k: int = 20, temperature: float = 0.07) -> None:
        super().__init__(interval)
        self.k, self.temperature = k, temperature

    def measure(self, snapshot: Snapshot) -> dict[str, float]:
        bank, queries = snapshot.training, snapshot.held_out
        top1_pct = knn_top1(
            bank.features_share,
            bank.labels,
            queries.features_share,
            queries.labels,
            k=self.k,
            temperature=self.temperature,
            device=bank.device,
        )
        return {KNN: top1_pct}
