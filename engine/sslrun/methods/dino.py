"""DINO: predict from each crop of an image the distribution over prototypes that a teacher gives a large crop.

Caron et al. 2021 (arXiv 2104.14294), algorithm 1 with multi-crop (eq. 3). Prototypes are the last layer of the
projector, with weights of unit length. Teacher's scores are centered (section 3.1): the center is a moving average of
their mean over the global batch, c <- m c + (1 - m) mean, without gradient. The loss is the mean over samples and over
all pairs of a large crop of the teacher and another crop of the student; the student's scores are never stored
(`sslkernels.prototype_cross_entropy`).

Crops of one size go through the backbone in one call and share BatchNorm statistics, as in the authors' code; the neck
sees all crops in one call. Deviations: the mean of the scores is that of the batch's embeddings times the teacher's
prototypes after their momentum update instead of before it, which is the same but for (1 - momentum) of one step's
change. Scores are float32 under autocast too.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels import prototype_cross_entropy
from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.nn.argument_checks import require_fraction, require_positive, require_temperature
from sslrun.nn.feature_std import feature_std
from sslrun.nn.heads import Head
from sslrun.nn.momentum import teacher_of
from sslrun.nn.necks import Neck, pooled
from sslrun.nn.precision import wide
from sslrun.scheduled import Number, Scheduled, at

MOMENTUM = Scheduled(schedule="cosine", start=0.996, end=1.0)


class Directions(nn.Module):
    """K vectors of unit length, or with a learned length that starts at 1; `forward` gives them, (K, D)."""

    def __init__(self, dim: int, count: int, learned_length: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.length = nn.Parameter(torch.ones(count, 1)) if learned_length else None

    def forward(self) -> Tensor:
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
    ) -> None:
        super().__init__()
        require_positive(feat_dim=feat_dim, num_prototypes=num_prototypes)
        require_temperature(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        require_fraction(center_momentum=center_momentum)
        self.feat_dim, self.center_momentum = feat_dim, center_momentum
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.prototypes = Directions(feat_dim, num_prototypes, learned_length)
        self.register_buffer("center", torch.zeros(num_prototypes))

    def forward(self, crops: Tensor, targets: Tensor, teacher: Tensor, progress: Progress) -> Tensor:
        """The mean over samples and pairs of different crops, 0-d, float32 (float64 for float64 crops).

        Args:
            crops: (V, B, D), normalized embeddings of the student.
            targets: (G, B, D), normalized embeddings of the first G crops by the teacher.
            teacher: (K, D), the teacher's prototypes.
            progress: position in the run.
        """
        (views, batch, _), large = crops.shape, len(targets)
        row = torch.arange(views * batch, device=crops.device)
        crop, sample = row // batch, row % batch
        pairs = torch.stack([sample + number * batch for number in range(large)], dim=1)
        meets = torch.stack([crop != number for number in range(large)], dim=1)
        shares = meets.to(crops.dtype) / (batch * large * (views - 1))
        with torch.autocast(crops.device.type, enabled=False):
            scores = targets.flatten(0, 1) @ teacher.T
            return prototype_cross_entropy(
                crops.flatten(0, 1), self.prototypes(), scores, pairs, shares,
                self.student_temperature, at(self.teacher_temperature, progress), self.center,
            )  # fmt: skip


class DINO(Method):
    """Self-distillation without labels: predicts a momentum teacher's distribution over prototypes (arXiv 2104.14294).

    It takes ResNets and vision transformers as backbone, and crops of one size or several, large ones first.

    Args:
        backbone: the encoder to train.
        neck: projector on top of the backbone, up to the bottleneck, such as DINONeck.
        head: prototypes and loss; its feat_dim must equal the neck's out_channels.
        momentum: EMA decay of the teacher, 0 to 1, or a schedule of it.
        large_crops: number of crops, from the first, that the teacher sees; they have one size.
    """

    def __init__(
        self,
        backbone: Backbone,
        neck: Neck,
        head: DINOHead,
        momentum: Number = MOMENTUM,
        large_crops: int = 2,
    ) -> None:
        super().__init__()
        neck.require_out_channels(head.feat_dim)
        require_fraction(momentum=momentum)
        require_positive(large_crops=large_crops)
        self.backbone, self.neck, self.head = backbone, neck, head
        self.teacher_backbone, self.teacher_neck = teacher_of(backbone), teacher_of(neck)
        self.teacher_prototypes = teacher_of(head.prototypes)
        self.momentum, self.large_crops = momentum, large_crops

    def targets(self, batches: list[Batch], progress: Progress) -> list[Tensor]:
        """The teacher's embeddings (G, B, D) of the large crops, normalized, per micro-batch."""
        return [
            _embedded(self.teacher_backbone, self.teacher_neck, batch.crops()[: self.large_crops], len(batch.index))
            for batch in batches
        ]

    def forward(self, batch: Batch, progress: Progress, targets: Tensor) -> Loss:
        crops = _embedded(self.backbone, self.neck, batch.views, len(batch.index))
        if len(crops) < max(2, self.large_crops):
            raise ValueError(f"data.views give {len(crops)} crop(s), expected two or more, and large_crops")
        loss = self.head(crops, targets, self.teacher_prototypes(), progress)
        return Loss(loss, {"feature_std": feature_std(crops[0])}, {"targets": targets.transpose(0, 1).flatten(1)})

    def teachers(self, progress: Progress) -> list[tuple[nn.Module, nn.Module, float]]:
        momentum = at(self.momentum, progress)
        return [
            (self.teacher_backbone, self.backbone, momentum),
            (self.teacher_neck, self.neck, momentum),
            (self.teacher_prototypes, self.head.prototypes, momentum),
        ]

    def after_step(self, progress: Progress, carry: dict[str, Tensor]) -> None:
        mean = carry["targets"].unflatten(1, (self.large_crops, -1)).mean(dim=(0, 1))
        scores = self.teacher_prototypes() @ mean
        self.head.center.lerp_(scores, 1 - at(self.head.center_momentum, progress))

    def chance_loss(self) -> float:
        return math.log(len(self.head.center))


def _embedded(backbone: Backbone, neck: Neck, views: Sequence[Tensor], batch: int) -> Tensor:
    """(V, B, D) normalized embeddings of all crops; those of one size that follow each other are one pass."""
    groups = [list(group) for _, group in itertools.groupby(views, key=lambda images: images.shape[-2:])]
    passes = [group[0] if len(group) == 1 else torch.cat(group) for group in groups]
    features = torch.cat([pooled(backbone(images)[-1]) for images in passes])
    return F.normalize(wide(neck(features)), dim=1).unflatten(0, (-1, batch))
