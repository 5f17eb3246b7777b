"""Heads: losses with their hyper-parameters."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels import batch_nce, info_nce, nt_xent
from sslrun.config.component import Component
from sslrun.nn.argument_checks import require_not_negative, require_temperature
from sslrun.nn.necks import Neck, pooled
from sslrun.nn.precision import wide
from sslrun.runtime.distributed import all_reduce_mean_with_gradient, group


class Head(nn.Module, Component, kind="heads"):
    """A loss. The arguments of `forward` depend on the method."""


class ContrastiveHead(Head):
    """InfoNCE: pick the one positive among a set of negatives (van den Oord et al. 2018, arXiv 1807.03748, eq. 4).

    Args:
        temperature: divisor of the cosine similarities.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        require_temperature(temperature=temperature)
        self.temperature = temperature

    def forward(self, queries: Tensor, positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """-log(exp(q.p/T) / (exp(q.p/T) + sum_k exp(q.n_k/T))), mean over the rows.

        Args:
            queries: (B, D), not yet normalized.
            positives: (B, D), normalized rows; row i belongs to query i.
            negatives: (K, D), normalized rows, shared by all queries.

        Returns:
            The loss, and the share of queries that are closest to their own positive; both 0-d fp32.
        """
        return info_nce(queries, positives, negatives, self.temperature)

    def between_views(self, embeddings: Tensor) -> Tensor:
        """NT-Xent: the positive is an image's other view, the negatives are all other rows of all ranks (Chen et al.
        2020, arXiv 2002.05709, eq. 1).

        Args:
            embeddings: (2B, D), not yet normalized; rows i and i + B are one image.

        Returns:
            Mean over the rows, 0-d fp32.
        """
        return nt_xent(embeddings, self.temperature, group=group())


class ClsHead(Head):
    """Linear classifier with cross-entropy; feature maps are averaged over their positions first.

    Args:
        in_channels: channels of the features.
        num_classes: number of classes K.
        init_std: standard deviation of the initial weights; initial biases are 0.
    """

    def __init__(self, in_channels: int, num_classes: int, init_std: float = 0.01) -> None:
        super().__init__()
        if in_channels < 1 or num_classes < 2:
            raise ValueError(f"in_channels is {in_channels} and num_classes {num_classes}, expected at least 1 and 2")
        if init_std <= 0:
            raise ValueError(f"init_std is {init_std}, expected a number above 0")
        self.num_classes, self.init_std = num_classes, init_std
        self.fc = nn.Linear(in_channels, num_classes)
        nn.init.normal_(self.fc.weight, std=init_std)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-log softmax(W x + b)_label, mean over the rows.

        Args:
            features: (B, C), or a feature map (B, C, H, W).
            labels: (B,) int64, 0 to K - 1.
            weights: (B,), weight of each row, with a mean of 1 over the global batch. The loss is then the weighted
                mean over the global batch, with or without accumulation.

        Returns:
            The loss, and the share of rows whose largest score is that of their label; both 0-d.
        """
        scores = self.fc(pooled(features))  # under autocast the loss is fp32 by itself
        losses = F.cross_entropy(scores, labels, reduction="none")
        loss = (losses if weights is None else losses * weights).mean()
        return loss, (scores.argmax(dim=1) == labels).float().mean()

    def redrawn(self, generator: torch.Generator) -> list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
        """Rewrites (see `Method.rewrites`) that reinitialize the head. The new weights are drawn in this call."""
        weight = torch.randn(self.fc.out_features, self.fc.in_features, generator=generator) * self.init_std
        return [
            (self.fc.get_parameter("weight"), lambda old: weight.to(old)),
            (self.fc.get_parameter("bias"), torch.zeros_like),
        ]


class PredictorHead(Head, listed=False):
    """A predictor on top of the neck, and a loss of its output.

    Attributes:
        predictor: network from an embedding to a prediction of the same dimension.
    """

    predictor: Neck

    def check_fits(self, neck: Neck) -> None:
        """Raises ValueError if predictions and embeddings have different dimensions."""
        if self.predictor.out_channels != neck.out_channels:
            raise ValueError(
                f"the head's predictor gives {self.predictor.out_channels} channels (out_channels), "
                f"but the neck {neck.out_channels}"
            )


class MoCoV3Head(PredictorHead):
    """A predictor, and InfoNCE of its output against the keys of the batch (Chen, Xie & He 2021, arXiv 2104.02057,
    algorithm 1).

    Args:
        predictor: network from a projection to the query that is compared with the keys.
        temperature: divisor of the cosine similarities.
    """

    def __init__(self, predictor: Neck, temperature: float = 1.0) -> None:
        super().__init__()
        require_temperature(temperature=temperature)
        self.predictor, self.temperature = predictor, temperature

    def forward(self, projections: Tensor, keys: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """-2T log(exp(q_i.k_own(i)/T) / sum_j exp(q_i.k_j/T)), mean over the rows.

        The factor 2T keeps the size of the gradient independent of T.

        Args:
            projections: (B, C), projections of one view.
            keys: (N, D), normalized keys of the other view, of the whole global batch.
            own: (B,) int64, the row of each projection's own key.

        Returns:
            The loss, 0-d fp32; and the queries q, (B, D), not normalized.
        """
        queries = self.predictor(projections)
        return 2 * self.temperature * batch_nce(queries, keys, own, self.temperature), queries


class LatentPredictHead(PredictorHead):
    """A predictor, and the negative cosine similarity between its output and the other view's embedding.

    The other view's embedding gets no gradient (Grill et al. 2020, arXiv 2006.07733, eq. 2, without its constant; Chen
    & He 2021, arXiv 2011.10566, eq. 1 and 3).

    Args:
        predictor: network from an embedding to a prediction of the same dimension.
    """

    def __init__(self, predictor: Neck) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        """-cos(predictor(embeddings), targets), mean over the rows: -1 for equal directions, 0 for unrelated ones.

        Args:
            embeddings: (B, D), not normalized.
            targets: (B, D), not normalized; row i is the other view of row i.
        """
        predictions = F.normalize(wide(self.predictor(embeddings)), dim=1)
        return -(predictions * F.normalize(wide(targets.detach()), dim=1)).sum(dim=1).mean()


class LatentCrossCorrelationHead(Head):
    """Distance of the cross-correlation of two views' embeddings from the identity (Zbontar et al. 2021, arXiv
    2103.03230, eq. 1 and 2).

        C = A^T B / rows,   loss = sum_i (1 - C_ii)^2 + lambd sum_i sum_{j != i} C_ij^2

    A and B are the embeddings, each dimension standardized over the rows of all ranks. C, D x D, is summed over all
    ranks too, so the loss is that of one process with all rows.

    Args:
        lambd: weight of the off-diagonal terms.
    """

    def __init__(self, lambd: float = 0.0051) -> None:
        super().__init__()
        require_not_negative(lambd=lambd)
        self.lambd = lambd

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss, 0-d, the same on all ranks.

        Args:
            first: (B, D), embeddings of one view; as many rows on every rank.
            second: (B, D), embeddings of the other view of the same images.
        """
        with torch.autocast(first.device.type, enabled=False):  # rounding C_ii would dominate 1 - C_ii
            local = _standardized(wide(first)).T @ _standardized(wide(second)) / len(first)
            correlation = all_reduce_mean_with_gradient(local)
            diagonal = correlation.diagonal()
            redundancy = correlation.square().sum() - diagonal.square().sum()
            return (1 - diagonal).square().sum() + self.lambd * redundancy


def _standardized(x: Tensor, eps: float = 1e-5) -> Tensor:
    """(B, D) with mean 0 and variance 1 in each dimension, over the rows of all ranks."""
    centered = x - all_reduce_mean_with_gradient(x.mean(dim=0))
    variance = all_reduce_mean_with_gradient(centered.square().mean(dim=0))
    return centered * torch.rsqrt(variance + eps)
