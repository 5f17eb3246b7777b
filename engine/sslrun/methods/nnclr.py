"""NNCLR: predict, from one view of an image, the nearest neighbor that its other view has among earlier images.

Dwibedi et al. 2021 (arXiv 2104.14548), algorithm 1 and eq. 2 to 4. With z the normalized projections of a view, p the
normalized predictions from them, and NN(z) the row of a queue with the largest dot product with z, the loss is

    1/2 [ CE(NN(z1) . p2 / T) + CE(NN(z2) . p1 / T) ],

where each neighbor is to find the prediction of its own image among those of the whole batch. Neighbors get no
gradient. After the search the first views' projections go into the queue, which starts with random directions. Each
view goes through the networks separately and has its own BatchNorm statistics, as in the paper.

Predictions are those of all ranks, the queue holds the rows of all ranks in the order of the global batch, and the
gradient is that of one process with the whole batch. The search is in float32 under autocast too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.nn.argument_checks import require_temperature
from sslrun.nn.feature_std import feature_std
from sslrun.nn.heads import PredictorHead
from sslrun.nn.necks import Neck
from sslrun.nn.precision import wide
from sslrun.nn.queue_and_bank import Queue
from sslrun.runtime.distributed import all_gather_rows_with_gradient, rank

PIECE = 2**26  # similarities that exist at once in the search: 256 MiB


class NNCLRHead(PredictorHead):
    """A predictor, and the contrastive loss between neighbors and predictions of the whole batch (Dwibedi et al. 2021,
    arXiv 2104.14548, eq. 2 to 4).

    Args:
        predictor: network from a projection to a prediction of the same dimension.
        temperature: divisor of the cosine similarities.
    """

    def __init__(self, predictor: Neck, temperature: float = 0.1) -> None:
        super().__init__()
        require_temperature(temperature=temperature)
        self.predictor, self.temperature = predictor, temperature

    def forward(self, projections: Tensor) -> Tensor:
        """The predictions from projections (B, D), normalized: (B, D)."""
        return F.normalize(wide(self.predictor(projections)), dim=1)

    def contrast(self, neighbors: Tensor, predictions: Tensor) -> Tensor:
        """-log(exp(n_i.p_i / T) / sum_j exp(n_i.p_j / T)), mean over this rank's rows; j runs over those of all ranks.

        Args:
            neighbors: (B, D), normalized, without gradient.
            predictions: (B, D), normalized; as many rows on every rank.
        """
        everyone = all_gather_rows_with_gradient(predictions)
        own = torch.arange(len(neighbors), device=neighbors.device) + rank() * len(neighbors)
        return F.cross_entropy(neighbors @ everyone.T / self.temperature, own)


class NNCLR(Method):
    """Contrastive learning with the nearest neighbors of earlier images as positives (arXiv 2104.14548).

    It takes two views of each image.

    Args:
        backbone: the encoder to train.
        neck: projector on top of the backbone.
        head: predictor on top of the neck, and contrastive loss.
        queue_len: number K of projections of earlier images, among which neighbors are searched.
    """

    num_views = 2
    compares_samples = True

    def __init__(self, backbone: Backbone, neck: Neck, head: NNCLRHead, queue_len: int = 98304) -> None:
        super().__init__()
        head.check_fits(neck)
        self.backbone, self.neck, self.head = backbone, neck, head
        self.queue = Queue(queue_len, neck.out_channels)

    def embed(self, batch: Batch, progress: Progress) -> list[Tensor]:
        """Projections of both views, normalized and without gradient; then the predictions from them."""
        projections = [self.neck(self.backbone(view)[-1]) for view in batch.crops()]
        units = [F.normalize(wide(each.detach()), dim=1) for each in projections]
        return [*units, *(self.head(each) for each in projections)]

    def compare(self, embedded: list[Tensor], progress: Progress) -> Loss:
        first, second, from_first, from_second = embedded
        with torch.autocast(first.device.type, enabled=False):
            neighbors, others = (nearest(view, self.queue.rows) for view in (first, second))
            loss = self.head.contrast(neighbors, from_second) + self.head.contrast(others, from_first)
        return Loss(loss / 2, {"feature_std": feature_std(first)}, {"projections": first.detach()})

    def after_step(self, progress: Progress, carry: dict[str, Tensor]) -> None:
        self.queue.push(carry["projections"])


@torch.no_grad()
def nearest(queries: Tensor, rows: Tensor) -> Tensor:
    """For each query the row with the largest dot product, the first of equal ones: (B, D). A part of the queries at a
    time, so that no B x K matrix exists.

    Args:
        queries: (B, D).
        rows: (K, D).
    """
    parts = queries.split(max(1, PIECE // len(rows)))
    return rows[torch.cat([(part @ rows.T).argmax(dim=1) for part in parts])].to(queries.dtype)
