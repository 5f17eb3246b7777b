"""DeepCluster: cluster the features of all images, train the network to predict the clusters, and repeat.

Caron et al. 2018 (arXiv 1807.05520), section 3. Before every epoch the features of center crops of the whole training
set are extracted, reduced by PCA to whitened dimensions, normalized and clustered by k-means (section 3.4). The
classifier is reinitialized, because the new clusters are unrelated to the old. The epoch draws all clusters equally
often (section 3.3), or weighs their samples.

Deviations from MMSelfSup, whose recipe this is: pseudo-labels are looked up by sample id on the device, so no data
worker can have outdated ones; k-means runs on all ranks; a clustering is a function of the weights, the seed and the
step, so a resume repeats it; sample weights, if any, have a mean of 1 over the global batch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.contract import Backbone, Batch, Loss, Method, Progress, Rewrite
from sslrun.errors import UsageError
from sslrun.nn.argument_checks import require_positive
from sslrun.nn.clustering import balancing_weights, k_means, whitened
from sslrun.nn.heads import ClsHead
from sslrun.nn.necks import Embedder, Neck


class DeepCluster(Method):
    """Predicts k-means clusters of the features, which are recomputed before every epoch (arXiv 1807.05520).

    The classifier is reinitialized with the clusters, so in every epoch the loss starts at that of guessing.

    Args:
        backbone: the encoder to train.
        neck: projector on top of the backbone, such as AvgPool2dNeck; its output is clustered and classified.
        head: classifier; its num_classes is the number of clusters.
        pca_dim: number of PCA dimensions that are clustered; at most the neck's out_channels.
        iterations: number of k-means iterations.
        uniform_sampling: whether an epoch draws all clusters equally often; if false, it draws every sample once.
        reweight: whether the loss weighs samples by the size of their cluster.
        reweight_power: exponent p of the weight of a sample if reweight is true, cluster size ** -p.
    """

    num_views = 1
    remembers_samples = True

    labels: Tensor
    counts: Tensor

    def __init__(
        self,
        backbone: Backbone,
        neck: Neck,
        head: ClsHead,
        pca_dim: int = 256,
        iterations: int = 20,
        uniform_sampling: bool = True,
        reweight: bool = False,
        reweight_power: float = 0.5,
    ) -> None:
        super().__init__()
        if not 1 <= pca_dim <= neck.out_channels:
            raise ValueError(f"pca_dim is {pca_dim}, expected 1 to {neck.out_channels}, the neck's out_channels")
        require_positive(iterations=iterations)
        self.backbone, self.neck, self.head = backbone, neck, head
        self.pca_dim, self.iterations, self.draws_clusters = pca_dim, iterations, uniform_sampling
        self.reweight, self.reweight_power = reweight, reweight_power

    def prepare(self, num_samples: int) -> None:
        if num_samples < self.head.num_classes:
            raise UsageError(f"{num_samples} samples cannot be put into {self.head.num_classes} clusters (num_classes)")
        self.register_buffer("labels", torch.zeros(num_samples, dtype=torch.long))
        self.register_buffer("counts", torch.zeros(self.head.num_classes, dtype=torch.long))

    def before_epoch(self, progress: Progress, features: Callable[[nn.Module], Tensor]) -> list[Rewrite]:
        generator = progress.generator()
        rows = whitened(features(Embedder(self.backbone, self.neck)), self.pca_dim, self.labels.device)
        _, labels = k_means(F.normalize(rows, dim=1), self.head.num_classes, generator, self.iterations)
        self.labels.copy_(labels)
        self.counts.zero_().index_add_(0, labels, torch.ones_like(labels))
        return self.head.redrawn(generator)

    def sampling_labels(self) -> Tensor:
        return self.labels

    def targets(self, batches: list[Batch], progress: Progress) -> list[Any]:
        """Labels (B,) and weights (B,), or None, of each micro-batch."""
        labels = [self.labels[batch.index] for batch in batches]
        if not self.reweight:
            return [(own, None) for own in labels]
        return list(zip(labels, balancing_weights(labels, self.counts, self.reweight_power), strict=True))

    def forward(self, batch: Batch, progress: Progress, targets: tuple[Tensor, Tensor | None]) -> Loss:
        loss, top1 = self.head(self.neck(self.backbone(batch.views[0])[-1]), *targets)
        return Loss(loss, {"top1_pct": 100 * top1, "clusters_in_use": (self.counts > 0).sum()})
