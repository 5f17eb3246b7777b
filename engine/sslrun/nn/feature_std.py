"""The standard deviation of embeddings, which measures collapse."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.contract import Pooled
from sslrun.nn.precision import wide


@torch.no_grad()
def feature_std(embeddings: Tensor) -> Pooled:
    """Standard deviation of the normalized embeddings (B, D) per dimension, times sqrt(D): 1 if they are spread evenly
    over the sphere, 0 if all are equal (Chen & He 2021, arXiv 2011.10566, section 4.1).

    It becomes that of the global batch, for any division among micro-batches and ranks.
    """
    unit = F.normalize(wide(embeddings), dim=1).double()  # squares cancel where all are almost equal
    return Pooled(
        torch.stack([torch.full_like(unit[0], len(unit)), unit.sum(dim=0), unit.square().sum(dim=0)]), _spread
    )


def _spread(sums: Tensor) -> Tensor:
    """0-d, from (3, D): the number of unit vectors, and per dimension their sum and the sum of their squares."""
    count, total, squares = sums
    variance = (squares / count - (total / count).square()).clamp(min=0)
    return variance.sqrt().mean() * sums.shape[1] ** 0.5
