"""Gram anchoring: the patches of an image stay as similar to each other as an earlier network finds them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.nn.precision import wide


def gram_loss(student: Tensor, anchor: Tensor) -> Tensor:
    """The mean, over images and all pairs of patches of an image, of the squared difference between the student's and
    the anchor's cosine similarity (Siméoni et al. 2025, arXiv 2508.10104, eq. 2, there a sum), 0-d, float32 (float64
    for float64 patches).

    Args:
        student: (N, T, C), outputs of the T patches of N images.
        anchor: (N, T, C'), the anchor's.
    """
    with torch.autocast(student.device.type, enabled=False):
        own, given = (F.normalize(wide(patches), dim=2) for patches in (student, anchor))
        return F.mse_loss(own @ own.transpose(1, 2), given @ given.transpose(1, 2))
