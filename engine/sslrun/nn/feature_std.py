"""The standard deviation of embeddings, which measures collapse."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def feature_std(embeddings: Tensor) -> Tensor:
    """Standard deviation of the normalized embeddings (B, D) per dimension, times sqrt(D): 1 if they are spread evenly
    over the sphere, 0 if all are equal (Chen & He 2021, arXiv 2011.10566, section 4.1)."""
    unit = F.normalize(embeddings.float(), dim=1)
    return unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5
