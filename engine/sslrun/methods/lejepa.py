"""LeJEPA: all crops of an image agree, and the embeddings of each crop are distributed as a standard normal.

Balestriero & LeCun 2025 (arXiv 2511.08544), algorithms 1 and 2. No teacher, no predictor and no stopped gradient. With
z_v the embedding of crop v and c the mean of those of the large crops, the loss is

    (1 - lambda) mean_v (z_v - c)^2  +  lambda mean_v SIGReg(z_v),

the squares as a mean over samples and dimensions. SIGReg projects the samples on random directions and tests each
projection for a standard normal, by the statistic of Epps and Pulley (1983):

    n  integral of | 1/n sum_i exp(i t x_i) - exp(-t^2 / 2) |^2 exp(-t^2 / 2) dt,

as the mean over directions. The integral is computed from -3 to 3 by the trapezoidal rule; the integrand is even, so
the knots from 0 on are enough, as in the authors' code. Directions are drawn anew in each step, from (seed, step)
alone, so that all ranks have the same.

The statistic is no mean over samples: n is the global batch, and the sums over samples cover all ranks. Its gradient is
that of one process with the whole batch. Crops of one size go through the backbone in one call, and all crops through
the neck in one call, so that they share BatchNorm statistics.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.nn.argument_checks import require_fraction, require_positive
from sslrun.nn.feature_std import feature_std
from sslrun.nn.heads import Head
from sslrun.nn.necks import Neck, pooled
from sslrun.nn.precision import wide
from sslrun.runtime.distributed import all_reduce_mean_with_gradient, world_size
from sslrun.scheduled import Number, at


class SIGReg(Head):
    """The distance of samples from a standard normal distribution, along random directions (Balestriero & LeCun 2025,
    arXiv 2511.08544, section 4; Epps & Pulley 1983).

    Args:
        num_slices: number of random directions.
        knots: number of points of the integral from 0 to t_max.
        t_max: end of the integral.
    """

    def __init__(self, num_slices: int = 1024, knots: int = 17, t_max: float = 3.0) -> None:
        super().__init__()
        require_positive(num_slices=num_slices)
        if knots < 2 or not 0 < t_max < math.inf:
            raise ValueError(f"knots is {knots} and t_max {t_max}, expected at least 2 and a finite number above 0")
        self.num_slices, self.knots, self.t_max = num_slices, knots, t_max

    def slices(self, dim: int, generator: torch.Generator) -> Tensor:
        """(D, M): M random directions of length 1, in host memory."""
        return F.normalize(torch.randn(dim, self.num_slices, generator=generator), dim=0)

    def forward(self, embeddings: Tensor, slices: Tensor) -> Tensor:
        """The statistic, mean over crops and directions: 0-d, the same on all ranks.

        Args:
            embeddings: (V, B, D), float32 or float64; as many samples on every rank.
            slices: (D, M), directions, equal on all ranks.
        """
        t = torch.linspace(0, self.t_max, self.knots, dtype=embeddings.dtype, device=embeddings.device)
        normal = torch.exp(-t.square() / 2)
        weights = 2 * self.t_max / (self.knots - 1) * normal
        weights[0] /= 2
        weights[-1] /= 2
        angles = (embeddings @ slices).unsqueeze(-1) * t
        parts = torch.stack([angles.cos().mean(dim=1), angles.sin().mean(dim=1)])
        real, imaginary = all_reduce_mean_with_gradient(parts)
        distances = (real - normal).square() + imaginary.square()
        return embeddings.shape[1] * world_size() * (distances @ weights).mean()


class LeJEPA(Method):
    """Crops of an image agree and embeddings are normally distributed; no teacher and no predictor (arXiv 2511.08544).

    It takes ResNets and vision transformers as backbone, and crops of one size or several, large ones first.

    Args:
        backbone: the encoder to train.
        neck: projector on top of the backbone.
        head: the distance from the normal distribution.
        lambd: weight of that distance, 0 to 1, or a schedule of it; the agreement of the crops has 1 - lambd.
        large_crops: number of crops, from the first, whose mean the others are to have.
    """

    compares_samples = True
    uncompiled = ("head",)  # collectives

    def __init__(
        self, backbone: Backbone, neck: Neck, head: SIGReg, lambd: Number = 0.05, large_crops: int = 2
    ) -> None:
        super().__init__()
        require_fraction(lambd=lambd)
        require_positive(large_crops=large_crops)
        self.backbone, self.neck, self.head = backbone, neck, head
        self.lambd, self.large_crops = lambd, large_crops

    def embed(self, batch: Batch, progress: Progress) -> list[Tensor]:
        groups = [list(group) for _, group in itertools.groupby(batch.views, key=lambda views: views.shape[-2:])]
        passes = [group[0] if len(group) == 1 else torch.cat(group) for group in groups]
        features = torch.cat([pooled(self.backbone(images)[-1]) for images in passes])
        return list(wide(self.neck(features)).split(len(batch.index)))

    def compare(self, embedded: list[Tensor], progress: Progress) -> Loss:
        if len(embedded) < max(2, self.large_crops):
            raise ValueError(f"data.views give {len(embedded)} crop(s), expected two or more, and large_crops")
        crops = torch.stack(embedded)
        slices = self.head.slices(crops.shape[-1], progress.generator()).to(crops, non_blocking=True)
        with torch.autocast(crops.device.type, enabled=False):
            distance = (crops - crops[: self.large_crops].mean(dim=0)).square().mean()
            statistic = self.head(crops, slices)
            weight = at(self.lambd, progress)
            loss = (1 - weight) * distance + weight * statistic
        return Loss(loss, {"feature_std": feature_std(crops[0])})
