"""The KoLeo regularizer, which spreads features over their sphere."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.errors import UsageError
from sslrun.nn.precision import wide


def koleo(features: Tensor, group: int, eps: float = 1e-8) -> Tensor:
    """-mean log of the distance of each feature, scaled to length 1, to the nearest other one of its group
    (Kozachenko-Leonenko; Sablayrolles et al. 2019, arXiv 1806.03198, eq. 2; DINOv2: Oquab et al. 2023, arXiv
    2304.07193, section 4), 0-d, float32 (float64 for float64 features).

    As in the authors' code the distance is that of x - y + eps, and eps is added to it. Which one is nearest has no
    gradient.

    Args:
        features: (B, D); rows k group to (k + 1) group are a group.
        group: number of rows that are compared with each other, 2 or more. It must divide B.

    Raises:
        UsageError: it does not divide B.
    """
    if group < 2 or len(features) % group:
        raise UsageError(f"koleo_group is {group}, expected 2 or more and a divisor of the micro-batch {len(features)}")
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(wide(features), dim=1, eps=eps).unflatten(0, (-1, group))
        with torch.no_grad():
            cosines = unit @ unit.transpose(1, 2)
            cosines.diagonal(dim1=1, dim2=2).fill_(-1)
            nearest = cosines.argmax(dim=2)
        others = unit.gather(1, nearest.unsqueeze(2).expand_as(unit))
        distances = F.pairwise_distance(unit.flatten(0, 1), others.flatten(0, 1), eps=eps)
        return -torch.log(distances + eps).mean()
