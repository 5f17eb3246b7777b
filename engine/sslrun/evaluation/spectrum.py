"""How well features fill their space: standard deviation, RankMe, singular values, alignment and uniformity.

RankMe (Garrido et al. 2023, arXiv 2210.02885, equation 1) is the exponential of the entropy of the singular values of
the (N, D) features, divided by their sum: how many of D directions the features use. Deviation: the paper adds 1e-7 to
each share so that its logarithm exists; here shares of 0 add nothing.

Alignment and uniformity (Wang & Isola 2020, arXiv 2005.10242, section 4) are computed from features of length 1.
Alignment is the mean squared distance of two views of one image (alpha = 2); uniformity is the logarithm of the mean of
exp(-2 squared distance) over all pairs of different images (t = 2). Lower is better for both. The two views are drawn
as in training.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.data.order import Sequential
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError
from sslrun.evaluation.evaluation import Evaluation
from sslrun.evaluation.features import BATCH, evenly, pooled, require_finite, unit_rows
from sslrun.evaluation.frozen_encoder import FrozenEncoder
from sslrun.evaluation.partial_result import PartialResult
from sslrun.runtime import distributed
from sslrun.runtime.stopping import stoppable

PIECE = 2**22  # entries in a piece of a matrix, 8 bytes each
RESOLUTION = 2.0**-24  # smaller singular values of fp32 features, relative to the largest, are rounding errors


@dataclass(frozen=True, kw_only=True)
class Spectrum(Evaluation):
    """Measures how well features fill their space: RankMe, alignment, uniformity; without labels.

    RankMe: Garrido et al. 2023, arXiv 2210.02885. Alignment and uniformity: Wang & Isola 2020, arXiv 2005.10242. It
    measures training images, and also reports the standard deviation and the singular values of their features.

    Attributes:
        num_samples: largest number of training images to measure; the cost of uniformity grows with its square.
        num_pairs: largest number of images whose two views are compared for alignment; 0 leaves alignment out.
    """

    num_samples: int = 20000
    num_pairs: int = 5000

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 2), ("num_pairs", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"eval.spectrum.{name} must be at least {least}, not {getattr(self, name)}")

    def run(self, encoder: FrozenEncoder, partial_result: PartialResult) -> dict[str, Any]:
        """Measures the training images: `spectrum/...` and the `singular_values`.

        Raises:
            UsageError: there is only one image.
            RunFailed: features are not finite.
        """
        source = encoder.train
        if len(source) < 2:
            raise UsageError(f"{source!r} has only one image: the spectrum needs two or more")
        ids = evenly(len(source), self.num_samples)
        features = encoder.features_share(source, ids)
        require_finite(features)
        values, feature_std = spectrum(features, encoder.device)
        results: dict[str, Any] = {
            "spectrum/feature_std": feature_std,
            "spectrum/rankme": rankme(values),
            "spectrum/uniformity": uniformity(features, encoder.device),
        }
        if self.num_pairs:
            pairs = two_views(encoder, ids[evenly(len(ids), self.num_pairs)])
            results["spectrum/alignment"] = alignment(*pairs, encoder.device)
        return {**results, "num_samples": len(ids), "singular_values": values.tolist()}


@torch.no_grad()
def spectrum(features: Tensor, device: torch.device) -> tuple[Tensor, float]:
    """Singular values and standard deviation of (N, D) features.

    They are computed from the D x D products in fp64, so that memory does not depend on N. Singular values that fp32
    cannot distinguish from 0 are 0.

    Args:
        features: (n, D), this rank's share, on any device.
        device: where to compute.

    Returns:
        (D,) singular values, fp64 on the CPU, largest first; NaN if features are not finite. And the standard deviation
        of the features scaled to length 1, as `nn.feature_std` defines it.
    """
    dim = features.shape[1]
    gram = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    sums = torch.zeros(
        3, dim, dtype=torch.float64, device=device
    )  # sums of unit rows and of their squares; number of rows
    size = max(1, PIECE // dim)
    most = -(-distributed.total_rows(features, device) // distributed.world_size() // size)
    for piece in stoppable(features.split(size), most):
        rows = piece.to(device).double()
        gram.addmm_(rows.T, rows)
        unit = F.normalize(rows, dim=1)
        sums += torch.stack([unit.sum(0), unit.square().sum(0), torch.full_like(sums[2], len(rows))])
    distributed.all_reduce_sum_(gram)
    mean, square = distributed.all_reduce_sum_(sums)[:2] / sums[2]
    feature_std = ((square - mean.square()).clamp(min=0).sqrt().mean() * dim**0.5).item()
    if not torch.isfinite(gram).all():
        return torch.full((dim,), math.nan, dtype=torch.float64), math.nan
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0).cpu()
    return torch.where(values > RESOLUTION * values[0], values, 0), feature_std


def rankme(singular_values: Tensor) -> float:
    """The exponential of the entropy of singular values (D,): D if all are equal, 1 if only one is not 0."""
    total = singular_values.sum()
    return float(torch.special.entr(singular_values / total).sum().exp()) if total != 0 else 0.0


@torch.no_grad()
def alignment(first: Tensor, second: Tensor, device: torch.device) -> float:
    """Mean squared distance of the features of two views of each image, (n, D) each, this rank's share."""
    distances = torch.zeros(2, dtype=torch.float64, device=device)  # sum and number of the distances
    size = max(1, PIECE // first.shape[1])
    for one, other in zip(first.split(size), second.split(size), strict=True):
        squares = (unit_rows(one, device) - unit_rows(other, device)).square().sum(1)
        distances += torch.stack([squares.double().sum(), torch.tensor(len(one), device=device).double()])
    total, count = distributed.all_reduce_sum_(distances).tolist()
    return total / count


@torch.no_grad()
def uniformity(features: Tensor, device: torch.device) -> float:
    """Log of the mean of exp(-2 squared distance) over all pairs of N features.

    Every rank gathers all N rows, fp32, and computes the distances from its own rows (n, D), in pieces.
    """
    num_rows = distributed.total_rows(features, device)
    rows = distributed.all_gather_shares(unit_rows(features, device), num_rows)
    mine = distributed.share(num_rows)
    total = torch.zeros((), dtype=torch.float64, device=device)
    size = max(1, PIECE // num_rows)
    places = torch.arange(num_rows, device=device)[mine].split(size)
    for place, piece in zip(places, rows[mine].split(size), strict=True):
        similarity = piece @ rows.T  # squared distance = 2 - 2 similarity
        similarity.scatter_(1, place.unsqueeze(1), -math.inf)  # no pairs of a row with itself
        total += (4 * similarity - 4).exp().sum(dtype=torch.float64)
    pairs = num_rows * (num_rows - 1)
    return float((distributed.all_reduce_sum_(total) / pairs).log())


def two_views(encoder: FrozenEncoder, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """Features (n, D) of two views of each image in this rank's share of the ids, drawn as in training.

    They are the first two views of the recipe; if it has only one view, that one is drawn twice.
    """
    group = encoder.views[0]
    if len(encoder.views) == 1 and group.num_views == 1:
        views = [ViewGroup(num_views=2, transforms=group.transforms)]
    else:
        views = encoder.views[:1] if group.num_views > 1 else encoder.views[:2]
    loader = encoder.loader(encoder.train, views, Sequential(len(encoder.train)))
    mine = ids[distributed.share(len(ids))]
    first, second = [], []
    with contextlib.closing(loader.run([(0, mine[i : i + BATCH]) for i in range(0, len(mine), BATCH)])) as stream:
        for batch in stream:
            one, other = (pooled(encoder.backbone, crop, encoder.bf16).cpu() for crop in batch.crops()[:2])
            first.append(one)
            second.append(other)
    return torch.cat(first), torch.cat(second)
