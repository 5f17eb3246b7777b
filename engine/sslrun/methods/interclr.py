"""InterCLR: MoCo, and beside it a contrast between images, whose positives are images of the same online cluster.

Xie et al. 2022 (arXiv 2008.11702), section 3. A bank holds a feature and a cluster of every image, as in ODC: after a
step the batch's rows become its keys and get new labels; every few steps centroids are computed from the bank, and
small clusters are dissolved and refilled. The positive of a query is the row of a random image of its image's cluster.
Its negatives are drawn from the `neg_pool` rows of other clusters that are most similar to the query ("semi-hard"). The
cosine similarity of the positive is lowered by a margin before it is divided by the temperature (eq. 5).

Deviations from the authors' code and MMSelfSup: negatives are drawn with replacement, and own clusters are left out of
the pool, not drawn again; draws are functions of (seed, step, position in the global batch); every epoch draws every
sample once; labels are nearest centroids; all state is in buffers, so that a resume is exact. See `ODC`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.contract import Backbone, Batch, Loss, Method, Progress, Rewrite
from sslrun.errors import UsageError
from sslrun.nn.argument_checks import require_fraction, require_not_negative, require_positive
from sslrun.nn.clustering import OnlineClusters
from sslrun.nn.drawn_rows import keys_of, uniform_indices
from sslrun.nn.feature_std import feature_std
from sslrun.nn.heads import ContrastiveHead
from sslrun.nn.momentum import encode_shuffled, teacher_of
from sslrun.nn.necks import Embedder, Neck
from sslrun.nn.precision import wide
from sslrun.nn.queue_and_bank import Queue
from sslrun.scheduled import Number, at


class Targets(NamedTuple):
    """Of a micro-batch of B samples.

    Attributes:
        keys: (B, D), normalized, of the momentum encoder.
        positives: (B,) int64, rows of the bank.
        draws: (B,) int64, the keys from which negatives are drawn.
    """

    keys: Tensor
    positives: Tensor
    draws: Tensor


class InterCLR(Method):
    """Contrast within images, as MoCo, and between images by clusters that are updated after every step
    (arXiv 2008.11702).

    It takes two views of each image.

    Args:
        backbone: the encoder to train.
        neck: projector on top of the backbone.
        head: contrastive loss within images; its temperature is that between images too.
        queue_len: number of negative keys within images.
        feat_dim: dimension D of the embeddings; must equal the neck's out_channels.
        momentum: EMA decay of the key encoder, 0 to 1, or a schedule of it.
        num_clusters: number of clusters of all images.
        neg_num: number of negatives between images for each query, drawn with replacement.
        neg_pool: number of the most similar rows of other clusters, of which they are drawn; the number of samples, or
            more, for all rows of other clusters.
        margin: what is subtracted from the cosine similarity of the positive; negative for an easier task.
        intra_weight: weight of the loss within images, or a schedule of it.
        inter_weight: weight of the loss between images, or a schedule of it.
        bank_momentum: weight of a new key in its row of the bank, 0 to 1; 1 replaces the row.
        min_cluster: smallest number of samples in a cluster; smaller clusters are dissolved and refilled.
        centroids_update_interval: optimizer steps between two updates of the centroids.
        deal_with_small_clusters_interval: optimizer steps between two checks for clusters below min_cluster.
    """

    num_views = 2
    remembers_samples = True

    changed: Tensor

    def __init__(
        self,
        backbone: Backbone,
        neck: Neck,
        head: ContrastiveHead,
        queue_len: int = 65536,
        feat_dim: int = 128,
        momentum: Number = 0.999,
        num_clusters: int = 10000,
        neg_num: int = 16384,
        neg_pool: int = 128000,
        margin: float = -0.5,
        intra_weight: Number = 0.75,
        inter_weight: Number = 0.25,
        bank_momentum: float = 1.0,
        min_cluster: int = 20,
        centroids_update_interval: int = 10,
        deal_with_small_clusters_interval: int = 1,
    ) -> None:
        super().__init__()
        neck.require_out_channels(feat_dim)
        require_fraction(momentum=momentum, bank_momentum=bank_momentum)
        require_positive(num_clusters=num_clusters, neg_num=neg_num, neg_pool=neg_pool)
        require_positive(centroids_update_interval=centroids_update_interval)
        require_positive(deal_with_small_clusters_interval=deal_with_small_clusters_interval)
        require_not_negative(min_cluster=min_cluster, intra_weight=intra_weight, inter_weight=inter_weight)
        self.backbone, self.neck, self.head = backbone, neck, head
        self.key_backbone, self.key_neck = teacher_of(backbone), teacher_of(neck)
        self.queue = Queue(queue_len, feat_dim)
        self.feat_dim, self.momentum, self.num_clusters = feat_dim, momentum, num_clusters
        self.neg_num, self.neg_pool, self.margin = neg_num, neg_pool, margin
        self.intra_weight, self.inter_weight = intra_weight, inter_weight
        self.bank_momentum, self.min_cluster = bank_momentum, min_cluster
        self.centroids_update_interval = centroids_update_interval
        self.deal_with_small_clusters_interval = deal_with_small_clusters_interval
        self.register_buffer("changed", torch.zeros(()))  # share of the last batch whose label changed

    def prepare(self, num_samples: int) -> None:
        if num_samples < self.num_clusters:
            raise UsageError(f"{num_samples} samples cannot be put into {self.num_clusters} clusters (num_clusters)")
        self.clusters = OnlineClusters(num_samples, self.feat_dim, self.num_clusters, self.bank_momentum)

    def before_epoch(self, progress: Progress, features: Callable[[nn.Module], Tensor]) -> list[Rewrite]:
        if progress.step == 0:
            self.clusters.start(features(Embedder(self.backbone, self.neck)), progress.generator())
        return []

    def targets(self, batches: list[Batch], progress: Progress) -> list[Targets]:
        generator = progress.generator()
        encoded = encode_shuffled(self._keys, [batch.crops()[1] for batch in batches], generator)
        draws = keys_of(batches, generator)
        members = self.clusters.labels.argsort(stable=True)  # cluster by cluster
        counts = self.clusters.counts
        first, sizes = counts.cumsum(0) - counts, counts.clamp(min=1)  # counts start at 0
        found = []
        for (keys,), batch, own in zip(encoded, batches, draws, strict=True):
            label = self.clusters.labels[batch.index]
            found.append(Targets(keys, members[first[label] + own % sizes[label]], own))
        return found

    def forward(self, batch: Batch, progress: Progress, targets: Targets) -> Loss:
        queries = self.neck(self.backbone(batch.crops()[0])[-1])
        intra, top1 = self.head(queries, targets.keys, self.queue.rows)
        inter, inter_top1 = self._between_images(queries, batch.index, targets)
        metrics = {
            "top1_pct": 100 * top1,
            "inter_top1_pct": 100 * inter_top1,
            "inter_loss": inter.detach(),
            "feature_std": feature_std(queries),
            "labels_changed_pct": 100 * self.changed,
            "smallest_cluster": self.clusters.counts.min(),
            "largest_cluster": self.clusters.counts.max(),
        }
        value = at(self.intra_weight, progress) * intra + at(self.inter_weight, progress) * inter
        return Loss(value, metrics, {"index": batch.index, "keys": targets.keys})

    def teachers(self, progress: Progress) -> list[tuple[nn.Module, nn.Module, float]]:
        momentum = at(self.momentum, progress)
        return [(self.key_backbone, self.backbone, momentum), (self.key_neck, self.neck, momentum)]

    def after_step(self, progress: Progress, carry: dict[str, Tensor]) -> None:
        self.queue.push(carry["keys"])
        changed = self.clusters.follow(
            progress, carry["index"], carry["keys"], self.min_cluster, self.centroids_update_interval,
            self.deal_with_small_clusters_interval,
        )  # fmt: skip
        self.changed.copy_(changed)

    def _keys(self, images: Tensor) -> tuple[Tensor]:
        return (F.normalize(wide(self.key_neck(self.key_backbone(images)[-1])), dim=1),)

    def _between_images(self, queries: Tensor, index: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """The loss of queries (B, D), and the share of them that are closest to their positive; both 0-d."""
        rows, labels = self.clusters.bank.rows, self.clusters.labels
        label = labels[index].unsqueeze(1)
        with torch.autocast(queries.device.type, enabled=False):
            unit = F.normalize(wide(queries), dim=1)
            with torch.no_grad():
                chosen = uniform_indices(targets.draws, self.neg_num, min(self.neg_pool, len(rows)))
                if self.neg_pool < len(rows):
                    similarities = (unit.to(rows.dtype) @ rows.T).masked_fill_(labels == label, -2)  # below all others
                    chosen = similarities.topk(self.neg_pool, dim=1).indices.gather(1, chosen)
            negatives = torch.bmm(rows[chosen].to(unit.dtype), unit.unsqueeze(2)).squeeze(2)
            negatives = negatives.masked_fill(labels[chosen] == label, -torch.inf)
            positives = (rows[targets.positives] * unit).sum(dim=1, keepdim=True)
            logits = torch.cat([positives - self.margin, negatives], dim=1) / self.head.temperature
            top1 = (positives > negatives).all(dim=1).to(unit.dtype).mean()
            return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long)), top1
