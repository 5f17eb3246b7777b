"""Self-distillation over prototypes, which DINO, iBOT, DINOv2 and DINOv3 share: the head and the projection of crops.

A student predicts the distribution over K prototypes that its own moving average, the teacher, gives the same image.
Scores are float32 under autocast too; those of the student are never stored (`sslkernels.prototype_cross_entropy`).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels import prototype_cross_entropy, sinkhorn_center
from sslrun.contract import Backbone, Pooled, Progress
from sslrun.nn.argument_checks import require_fraction, require_positive, require_temperature
from sslrun.nn.heads import Head
from sslrun.nn.necks import Neck, pooled
from sslrun.nn.packing import has_varlen_attention
from sslrun.nn.precision import wide
from sslrun.nn.vit import VisionTransformer
from sslrun.runtime import distributed
from sslrun.scheduled import Number, Scheduled, at

MOMENTUM = Scheduled(schedule="cosine", start=0.996, end=1.0)
SINKHORN_ITERATIONS = 3


class Prototypes(nn.Module):
    """K vectors; `forward` gives them, (K, D).

    Args:
        dim: dimension D.
        count: number K.
        weight_norm: whether the vectors have unit length, or a length of their own; else they are a plain weight.
        learned_length: whether that length is learned; it starts at 1.
    """

    def __init__(self, dim: int, count: int, weight_norm: bool, learned_length: bool) -> None:
        super().__init__()
        self.weight_norm = weight_norm
        self.weight = nn.Parameter(torch.empty(count, dim))
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.length = nn.Parameter(torch.ones(count, 1)) if learned_length else None

    def forward(self) -> Tensor:
        if not self.weight_norm:
            return self.weight
        unit = F.normalize(self.weight, dim=1)
        return unit if self.length is None else self.length * unit


class DINOHead(Head):
    """Prototypes, and the cross-entropy between a teacher's centered and sharpened scores and a student's (Caron et al.
    2021, arXiv 2104.14294, eq. 1 to 3).

    Args:
        feat_dim: dimension D of the embeddings, which are normalized before they are scored.
        num_prototypes: number K of prototypes.
        student_temperature: temperature of the student's scores.
        teacher_temperature: temperature of the teacher's scores, or a schedule of it; above 0.07 training is unstable.
        center_momentum: decay of the moving average of the teacher's mean scores, 0 to 1.
        learned_length: whether prototypes learn their length (norm_last_layer = false in the authors' code).
        weight_norm: whether prototypes are divided by their length; false for a plain linear layer, as in DINOv3.
        centering: what keeps the teacher from one answer for all: "mean" subtracts the moving average of its scores;
            "sinkhorn" lets the rows of the global batch use all prototypes equally, by three of Sinkhorn's iterations
            at the teacher's temperature (Oquab et al. 2023, arXiv 2304.07193, section 4).
    """

    center: Tensor

    def __init__(
        self,
        feat_dim: int = 256,
        num_prototypes: int = 65536,
        student_temperature: float = 0.1,
        teacher_temperature: Number = 0.04,
        center_momentum: Number = 0.9,
        learned_length: bool = False,
        centering: Literal["mean", "sinkhorn"] = "mean",
        weight_norm: bool = True,
    ) -> None:
        super().__init__()
        require_positive(feat_dim=feat_dim, num_prototypes=num_prototypes)
        require_temperature(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        require_fraction(center_momentum=center_momentum)
        if learned_length and not weight_norm:
            raise ValueError("learned_length = true needs weight_norm = true: without it the length is the weight's")
        self.feat_dim, self.num_prototypes, self.centering = feat_dim, num_prototypes, centering
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.center_momentum = center_momentum
        self.prototypes = Prototypes(feat_dim, num_prototypes, weight_norm, learned_length)
        self.register_buffer("center", torch.zeros(num_prototypes))

    @property
    def chance_loss(self) -> float:
        """The loss of a student that gives all prototypes the same probability."""
        return math.log(self.num_prototypes)

    def scores(self, embeddings: Tensor, prototypes: Tensor) -> Tensor:
        """(R, K) scores of normalized embeddings (..., D), not rounded under autocast.

        Args:
            embeddings: (..., D).
            prototypes: (K, D), the teacher's.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            return embeddings.flatten(0, -2) @ prototypes.T

    def center_of(self, embeddings: list[Tensor], prototypes: Tensor, progress: Progress, average: Tensor) -> Tensor:
        """(K,) what is subtracted from the teacher's scores in this step: `average`, or Sinkhorn's center of the
        rows of all ranks. All ranks call it.

        Args:
            embeddings: the teacher's of this rank's micro-batches, (..., D) each, normalized.
            prototypes: (K, D), the teacher's.
            progress: position in the run.
            average: (K,), the moving average of the teacher's mean scores.
        """
        if self.centering == "mean":
            return average
        # All at once would fill the memory.
        parts: list[Callable[[], Tensor]] = [partial(self.scores, each, prototypes) for each in embeddings]
        temperature = at(self.teacher_temperature, progress)
        return sinkhorn_center(parts, temperature, SINKHORN_ITERATIONS, group=distributed.group())

    def forward(
        self, crops: Tensor, scores: Tensor, center: Tensor, progress: Progress, small_weight: float = 1.0
    ) -> Tensor:
        """The mean over samples and pairs of different crops, 0-d, float32 (float64 for float64 crops).

        Args:
            crops: (V, B, D), normalized embeddings of the student.
            scores: (G x B, K), the teacher's scores of the first G crops.
            center: (K,), subtracted from them.
            progress: position in the run.
            small_weight: factor of the pairs whose student sees a crop that the teacher does not.
        """
        (views, batch, _), large = crops.shape, len(scores) // crops.shape[1]
        row = torch.arange(views * batch, device=crops.device)
        crop, sample = row // batch, row % batch
        pairs = torch.stack([sample + number * batch for number in range(large)], dim=1)
        meets = torch.stack([crop != number for number in range(large)], dim=1)
        weight = torch.where(crop < large, 1.0, small_weight).to(crops.dtype)
        shares = meets * weight.unsqueeze(1) / (batch * large * (views - 1))
        return self._cross_entropy(crops.flatten(0, 1), scores, pairs, shares, center, progress)

    def of_patches(self, patches: Tensor, scores: Tensor, shares: Tensor, center: Tensor, progress: Progress) -> Tensor:
        """The weighted sum over patches, 0-d: each against the teacher's scores of the same patch.

        Args:
            patches: (P, D), normalized embeddings of the student.
            scores: (P, K), the teacher's.
            shares: (P,), weights.
            center: (K,), subtracted from the scores.
            progress: position in the run.
        """
        return self._cross_entropy(patches, scores, None, shares.unsqueeze(1), center, progress)

    def _cross_entropy(
        self, rows: Tensor, scores: Tensor, pairs: Tensor | None, shares: Tensor, center: Tensor, progress: Progress
    ) -> Tensor:
        return prototype_cross_entropy(
            rows, self.prototypes(), scores, pairs, shares,
            self.student_temperature, at(self.teacher_temperature, progress), center,
        )  # fmt: skip

    def follow(self, center: Tensor, total: Tensor, count: Tensor, prototypes: Tensor, progress: Progress) -> None:
        """Moves the average of the teacher's mean scores: the mean of the scores is the score of the mean embedding.

        Args:
            center: (K,), the average, changed in place; it stays where `count` is 0.
            total: (D,), sum of the teacher's normalized embeddings over the global batch.
            count: 0-d, the number of embeddings.
            prototypes: (K, D), the teacher's.
            progress: position in the run.
        """
        if self.centering == "mean":
            weight = (count > 0).to(center.dtype) * (1 - at(self.center_momentum, progress))
            center.lerp_(prototypes @ (total / count.clamp(min=1)), weight)

    @torch.no_grad()
    def signs(self, scores: Tensor, center: Tensor) -> dict[str, Tensor | Pooled]:
        """Metrics of the targets, by which a collapse is seen: the share of them, in per cent, whose largest entry is
        at the same prototype; and, with a moving average, the largest absolute value in it.

        Args:
            scores: (R, K), the teacher's.
            center: (K,), subtracted from them.
        """
        best = (scores - center).argmax(dim=1)
        counts = torch.zeros_like(center).index_add_(0, best, torch.ones_like(best, dtype=center.dtype))
        metrics: dict[str, Tensor | Pooled] = {
            "largest_prototype_pct": Pooled(counts, _largest_pct),
            "center_size": center.abs().max(),
        }
        if self.centering != "mean":
            del metrics["center_size"]
        return metrics


def _largest_pct(counts: Tensor) -> Tensor:
    return 100 * counts.max() / counts.sum()


def passes(views: Sequence[Tensor]) -> list[Tensor]:
    """Crops of one size that follow each other as one tensor: what goes through a network in one call."""
    groups = [list(group) for _, group in itertools.groupby(views, key=lambda images: images.shape[-2:])]
    return [group[0] if len(group) == 1 else torch.cat(group) for group in groups]


def embedded(neck: Neck, features: Tensor) -> Tensor:
    """(N, D) normalized embeddings of features (N, C), float32 under autocast too."""
    return F.normalize(wide(neck(features)), dim=1)


def outputs_of_sizes(backbone: Backbone, sizes: Sequence[Tensor], **first: Tensor) -> list[Tensor]:
    """What a backbone returns for images of the first size, and the features of each other size.

    Vision transformers compute all sizes in one pass where the device has attention for it (`sslrun.nn.packing`).

    Args:
        backbone: the backbone.
        sizes: images of each size, from `passes`.
        first: further arguments of the pass of the first size.
    """
    images, *others = sizes
    if others and isinstance(backbone, VisionTransformer) and has_varlen_attention(images):
        return backbone(images, **first, others=others)
    return [*backbone(images, **first), *(backbone(each)[-1] for each in others)]


def crops_embedded(backbone: Backbone, neck: Neck, views: Sequence[Tensor], batch: int) -> Tensor:
    """(V, B, D) normalized embeddings of all crops; those of one size that follow each other are one pass."""
    sizes = passes(views)
    features = outputs_of_sizes(backbone, sizes)[-len(sizes) :]
    return embedded(neck, torch.cat([pooled(each) for each in features])).unflatten(0, (-1, batch))
