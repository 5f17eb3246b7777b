"""ODC, online deep clustering: the clusters are updated after every step, while the network learns to predict them.

Zhan et al. 2020 (arXiv 2006.10645), section 3.2 and 3.3. A bank holds a feature and a label for every sample. After a
step the batch's rows of the bank move toward its new features (eq. 2) and get new labels; every few steps centroids
are computed from the bank, and clusters that have become small are dissolved and refilled. The loss weighs samples by
the size of their cluster (section 3.3). The first clusters come from k-means on the untrained network's features.

As in the authors' code and MMSelfSup, rows of the bank are normalized again after each update. Deviations from both: a
sample's new label is its nearest centroid, as in the paper and in k-means (theirs has the largest inner product, which
prefers clusters whose members are alike); sample weights have a mean of 1 over the global batch; every epoch draws
every sample once (theirs draws with replacement, for which the paper gives no reason); the first k-means clusters the
normalized features that the bank holds; all state is in buffers, so that a resume is exact.

Every `deal_with_small_clusters_interval` steps small clusters are dissolved, if there was one after the step before.
(A third deviation: with theirs, a cluster that becomes small is dissolved in the same step.) The host learns of it one
step late, so it need not wait for the device in every step; it does where there is a cluster to dissolve.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.contract import Backbone, Batch, Loss, Method, Progress, Rewrite
from sslrun.errors import UsageError
from sslrun.nn.argument_checks import require_fraction, require_not_negative, require_positive
from sslrun.nn.clustering import OnlineClusters, balancing_weights
from sslrun.nn.dropout import dropout_masks
from sslrun.nn.heads import ClsHead
from sslrun.nn.necks import Embedder, ODCNeck
from sslrun.nn.precision import wide


class ODC(Method):
    """Online deep clustering: predicts clusters that are updated after every step (arXiv 2006.10645).

    It takes one view of each image.

    Args:
        backbone: the encoder to train.
        neck: projector on top of the backbone; its output is clustered and classified.
        head: classifier; its num_classes is the number of clusters.
        momentum: weight of a new feature in its row of the bank, 0 to 1.
        min_cluster: smallest number of samples in a cluster; smaller clusters are dissolved and refilled.
        centroids_update_interval: optimizer steps between two updates of the centroids.
        deal_with_small_clusters_interval: optimizer steps between two checks for clusters below min_cluster. A cluster
            that becomes small is dissolved one step later at the earliest.
        reweight_power: exponent p of the weight of a sample in the loss, cluster size ** -p.
    """

    num_views = 1
    remembers_samples = True

    changed: Tensor

    def __init__(
        self,
        backbone: Backbone,
        neck: ODCNeck,
        head: ClsHead,
        momentum: float = 0.5,
        min_cluster: int = 20,
        centroids_update_interval: int = 10,
        deal_with_small_clusters_interval: int = 1,
        reweight_power: float = 0.5,
    ) -> None:
        super().__init__()
        require_fraction(momentum=momentum)
        require_not_negative(min_cluster=min_cluster)
        require_positive(
            centroids_update_interval=centroids_update_interval,
            deal_with_small_clusters_interval=deal_with_small_clusters_interval,
        )
        self.backbone, self.neck, self.head = backbone, neck, head
        self.momentum, self.min_cluster, self.reweight_power = momentum, min_cluster, reweight_power
        self.centroids_update_interval = centroids_update_interval
        self.deal_with_small_clusters_interval = deal_with_small_clusters_interval
        self.register_buffer("changed", torch.zeros(()))  # share of the last batch whose label changed

    def prepare(self, num_samples: int) -> None:
        num_clusters = self.head.num_classes
        if num_samples < num_clusters:
            raise UsageError(f"{num_samples} samples cannot be put into {num_clusters} clusters (num_classes)")
        self.clusters = OnlineClusters(num_samples, self.neck.out_channels, num_clusters, self.momentum)

    def before_epoch(self, progress: Progress, features: Callable[[nn.Module], Tensor]) -> list[Rewrite]:
        if progress.step > 0:
            return []
        generator = progress.generator()
        self.clusters.start(features(Embedder(self.backbone, self.neck)), generator)
        return self.head.redrawn(generator)

    def targets(self, batches: list[Batch], progress: Progress) -> list[Any]:
        """Labels (B,), weights (B,) and dropout masks (B, hid_channels), or None, of each micro-batch."""
        labels = [self.clusters.labels[batch.index] for batch in batches]
        weights = balancing_weights(labels, self.clusters.counts, self.reweight_power)
        masks: list[Any] = [None] * len(batches)
        if self.neck.dropout > 0:
            shape = (len(labels[0]), self.neck.hid_channels)
            seed = progress.generator().initial_seed()
            masks = dropout_masks(len(batches), shape, self.neck.dropout, seed, labels[0].device)
        return list(zip(labels, weights, masks, strict=True))

    def forward(self, batch: Batch, progress: Progress, targets: tuple[Tensor, Tensor, Tensor | None]) -> Loss:
        labels, weights, mask = targets
        embeddings = self.neck(self.backbone(batch.views[0])[-1], mask)
        loss, top1 = self.head(embeddings, labels, weights)
        metrics = {
            "top1_pct": 100 * top1,
            "labels_changed_pct": 100 * self.changed,
            "smallest_cluster": self.clusters.counts.min(),
            "largest_cluster": self.clusters.counts.max(),
        }
        rows = F.normalize(wide(embeddings.detach()), dim=1)
        return Loss(loss, metrics, {"index": batch.index, "features": rows})

    def after_step(self, progress: Progress, carry: dict[str, Tensor]) -> None:
        changed = self.clusters.follow(
            progress, carry["index"], carry["features"], self.min_cluster, self.centroids_update_interval,
            self.deal_with_small_clusters_interval,
        )  # fmt: skip
        self.changed.copy_(changed)

    def chance_loss(self) -> float:
        return math.log(self.head.num_classes)
