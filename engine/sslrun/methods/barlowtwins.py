"""Barlow Twins: two views agree in every dimension, and no two dimensions are correlated.

Zbontar et al. 2021 (arXiv 2103.03230), algorithm 1; the loss is eq. 1 there, a plain sum over the D x D
cross-correlations. As in the paper, each view goes through the network separately and has its own BatchNorm statistics.

Correlations are computed over the batch of all ranks, and the gradient is that of one process with the whole batch. (In
the paper's code and in MMSelfSup's, autograd does not see the sum over ranks, so the gradient is divided by the number
of ranks once too often. LARS compensates for that, except in the parameters that it does not scale.)
"""

from torch import Tensor

from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.nn.feature_std import feature_std
from sslrun.nn.heads import LatentCrossCorrelationHead
from sslrun.nn.necks import Neck


class BarlowTwins(Method):
    """Redundancy reduction: two views agree in each dimension, and dimensions are uncorrelated (arXiv 2103.03230).

    It takes two views of each image.

    Args:
        backbone: the encoder to train.
        neck: projector on top of the backbone; its out_channels D is the number of dimensions that are correlated.
        head: loss on the cross-correlation of the two views' embeddings.
    """

    num_views = 2
    compares_samples = True

    def __init__(self, backbone: Backbone, neck: Neck, head: LatentCrossCorrelationHead) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head

    def embed(self, batch: Batch, progress: Progress) -> list[Tensor]:
        return [self.neck(self.backbone(images)[-1]) for images in batch.crops()]

    def compare(self, embedded: list[Tensor], progress: Progress) -> Loss:
        first, second = embedded
        return Loss(self.head(first, second), {"feature_std": feature_std(first)})
