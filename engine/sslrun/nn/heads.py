"""Losses with their hyper-parameters: what turns embeddings into a number to minimise."""

from torch import Tensor, nn

from sslkernels import info_nce
from sslrun.config.component import Component


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
