"""Losses with their hyper-parameters: what turns embeddings into a number to minimise."""

import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels import batch_nce, info_nce
from sslrun.config.component import Component
from sslrun.nn.necks import Neck, pooled


class Head(nn.Module, Component, kind="heads"):
    """A loss. What goes into `forward` depends on the method."""


class ContrastiveHead(Head):
    """InfoNCE: pick the one positive among a set of negatives (van den Oord et al. 2018, arXiv 1807.03748, eq. 4).

    Args:
        temperature: divides the cosine similarities.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}, expected a number above 0")
        self.temperature = temperature

    def forward(self, queries: Tensor, positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """-log(exp(q.p/T) / (exp(q.p/T) + sum_k exp(q.n_k/T))), mean over the rows.

        Args:
            queries: (B, D), not yet normalised.
            positives: (B, D), normalised rows; row i belongs to query i.
            negatives: (K, D), normalised rows, shared by all queries.

        Returns:
            The loss, and the share of queries that are closest to their own positive; both 0-d fp32.
        """
        return info_nce(queries, positives, negatives, self.temperature)


class ClsHead(Head):
    """Linear classifier with cross-entropy, on features averaged over their positions.

    Args:
        in_channels: of the features.
        num_classes: K.
        init_std: standard deviation of the first weights; biases start at 0.
    """

    def __init__(self, in_channels: int, num_classes: int, init_std: float = 0.01) -> None:
        super().__init__()
        if in_channels < 1 or num_classes < 2:
            raise ValueError(f"in_channels is {in_channels} and num_classes {num_classes}, expected at least 1 and 2")
        if init_std <= 0:
            raise ValueError(f"init_std is {init_std}, expected a number above 0")
        self.num_classes = num_classes
        self.fc = nn.Linear(in_channels, num_classes)
        nn.init.normal_(self.fc.weight, std=init_std)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """-log softmax(W x + b)_label, mean over the rows.

        Args:
            features: (B, C), or a feature map (B, C, H, W).
            labels: (B,) int64, 0 to K - 1.

        Returns:
            The loss, and the share of rows whose largest score is that of their label; both 0-d.
        """
        scores = self.fc(pooled(features))  # under autocast the loss is fp32 by itself
        return F.cross_entropy(scores, labels), (scores.argmax(dim=1) == labels).float().mean()


class MoCoV3Head(Head):
    """A predictor, and InfoNCE of its output among the keys of the batch (Chen, Xie & He 2021, arXiv 2104.02057,
    algorithm 1).

    Args:
        predictor: network between a projection and what is compared with the keys.
        temperature: T; divides the cosine similarities.
    """

    def __init__(self, predictor: Neck, temperature: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}, expected a number above 0")
        self.predictor, self.temperature = predictor, temperature

    def forward(self, projections: Tensor, keys: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """-2T log(exp(q_i.k_own(i)/T) / sum_j exp(q_i.k_j/T)), mean over the rows; the 2T keeps gradients of one size.

        Args:
            projections: (B, C), of one view.
            keys: (N, D), normalised rows, of the other views of the whole global batch.
            own: (B,) int64, the row of a projection's own key.

        Returns:
            The loss, 0-d fp32; and the queries q, (B, D), not normalised.
        """
        queries = self.predictor(projections)
        return 2 * self.temperature * batch_nce(queries, keys, own, self.temperature), queries
