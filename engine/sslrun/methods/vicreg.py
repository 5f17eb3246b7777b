"""VICReg: two views agree, every dimension keeps its variance, and no two dimensions are correlated.

Bardes, Ponce & LeCun 2022 (arXiv 2105.04906), algorithm 1. Invariance is the squared distance of the two views, as a
mean over samples and dimensions; variance is eq. 1 and 2, covariance eq. 3 and 4 there. As in the authors' code, the
variance term is the mean over the two views and the covariance term their sum. In eq. 6 both are sums: variance = 50
gives the paper's loss with its weight of 25. Each view goes through the network separately and has its own BatchNorm
statistics.

Variances and covariances are those of the global batch, and the gradient is that of one process with the whole batch.
For N centered samples X of D dimensions, the entries of X^T X (D x D) and of X X^T (N x N) have the same sum of
squares. The smaller matrix is computed, and each rank computes its own rows of X X^T.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.nn.argument_checks import require_not_negative
from sslrun.nn.feature_std import feature_std
from sslrun.nn.necks import Neck
from sslrun.nn.precision import wide
from sslrun.runtime.distributed import all_gather_rows_with_gradient, all_reduce_mean_with_gradient, world_size


class VICReg(Method):
    """Variance-invariance-covariance regularization of the embeddings of two views (arXiv 2105.04906).

    It takes two views of each image.

    Args:
        backbone: the encoder to train.
        neck: projector on top of the backbone, the expander of the paper.
        invariance: weight of the squared distance between the two views.
        variance: weight of the hinge that keeps the standard deviation of every dimension at 1, mean over the views.
        covariance: weight of the squared covariances of all pairs of dimensions, sum over the views.
    """

    num_views = 2
    compares_samples = True

    def __init__(
        self,
        backbone: Backbone,
        neck: Neck,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
    ) -> None:
        super().__init__()
        require_not_negative(invariance=invariance, variance=variance, covariance=covariance)
        self.backbone, self.neck = backbone, neck
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    def embed(self, batch: Batch, progress: Progress) -> list[Tensor]:
        return [wide(self.neck(self.backbone(images)[-1])) for images in batch.crops()]

    def compare(self, embedded: list[Tensor], progress: Progress) -> Loss:
        with torch.autocast(embedded[0].device.type, enabled=False):  # squared covariances are small differences
            first, second = embedded
            distance = F.mse_loss(first, second)
            hinges, redundancies = zip(*(hinge_and_redundancy(view) for view in (first, second)), strict=True)
            spread, redundancy = sum(hinges) / 2, sum(redundancies)
            loss = self.invariance * distance + self.variance * spread + self.covariance * redundancy
        return Loss(loss, {"feature_std": feature_std(first)})


def hinge_and_redundancy(x: Tensor) -> tuple[Tensor, Tensor]:
    """By how much standard deviations are below 1, mean over dimensions; and the sum of the squared covariances of
    different dimensions, divided by D. Both are 0-d, and their means over ranks are those of the rows of all ranks.

    Args:
        x: (B, D), embeddings of one view; as many rows on every rank.
    """
    rows, dim = len(x) * world_size(), x.shape[1]
    if rows < 2:
        raise ValueError("VICReg computes variances over the batch, which needs two samples or more")
    centered = x - all_reduce_mean_with_gradient(x.mean(dim=0))
    variances = all_reduce_mean_with_gradient(centered.square().mean(dim=0)) * (rows / (rows - 1))
    if rows < dim:
        products = centered @ all_gather_rows_with_gradient(centered).T / (rows - 1)
        squares = world_size() * products.square().sum()
    else:
        squares = (all_reduce_mean_with_gradient(centered.T @ centered / len(x)) * (rows / (rows - 1))).square().sum()
    return F.relu(1 - torch.sqrt(variances + 1e-4)).mean(), (squares - variances.square().sum()) / dim
