"""MSN: predict from masked and small crops of an image the prototypes that a teacher gives another, whole crop.

Assran et al. 2022 (arXiv 2204.07141), section 3; where the paper is silent, the authors' code. Embeddings and
prototypes are normalized. A prediction is p = softmax(z . q / T); the target of the first crop is that of the teacher's
embedding, sharpened by a power of 1 / 0.25 and made to use all prototypes equally by Sinkhorn's iteration over the
targets of the global batch. The loss is

    mean over anchors and images of CE(target, p)  +  w (ln K - H(mean p)),

where the mean of the predictions is that of all anchors of the global batch (mean entropy maximization).

Both the iteration and the mean cover all ranks, and the gradient is that of one process with the whole batch. Large
anchors lose some patches: the same for all images of a step, drawn from (seed, step) alone; others keep all. The
neck sees all anchors in one call. Scores are float32 under autocast too. Under accumulation with the gradient cache the
teacher runs twice for each image.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels import sinkhorn_center, soft_cross_entropy
from sslrun.contract import Batch, Loss, Method, Progress
from sslrun.nn.argument_checks import (
    require_fraction,
    require_not_negative,
    require_positive,
    require_rate,
    require_temperature,
)
from sslrun.nn.feature_std import feature_std
from sslrun.nn.heads import Head
from sslrun.nn.momentum import teacher_of
from sslrun.nn.necks import Neck
from sslrun.nn.precision import wide
from sslrun.nn.self_distillation import outputs_of_sizes, passes
from sslrun.nn.vit import VisionTransformer
from sslrun.runtime import distributed
from sslrun.scheduled import Number, Scheduled, at

MOMENTUM = Scheduled(schedule="linear", start=0.996, end=0.9992)  # 1 is reached at 1.25 times the steps of the run


class MSNHead(Head):
    """Prototypes, the cross-entropy between a teacher's assignments and a student's, and the entropy of the student's
    mean (Assran et al. 2022, arXiv 2204.07141, eq. 1 and section 3.2).

    Args:
        feat_dim: dimension D of the embeddings, which are normalized before they are scored.
        num_prototypes: number K of prototypes.
        temperature: temperature of the student's scores.
        target_temperature: temperature of the teacher's scores; in the paper a quarter of the student's.
        sinkhorn_iterations: number of Sinkhorn iterations over the targets; 0 for none.
        entropy_weight: weight of ln K less the entropy of the mean prediction.
    """

    def __init__(
        self,
        feat_dim: int = 256,
        num_prototypes: int = 1024,
        temperature: float = 0.1,
        target_temperature: float = 0.025,
        sinkhorn_iterations: int = 3,
        entropy_weight: Number = 1.0,
    ) -> None:
        super().__init__()
        require_positive(feat_dim=feat_dim, num_prototypes=num_prototypes)
        require_temperature(temperature=temperature, target_temperature=target_temperature)
        require_not_negative(sinkhorn_iterations=sinkhorn_iterations, entropy_weight=entropy_weight)
        self.feat_dim, self.temperature, self.target_temperature = feat_dim, temperature, target_temperature
        self.sinkhorn_iterations, self.entropy_weight = sinkhorn_iterations, entropy_weight
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, feat_dim))
        nn.init.uniform_(self.prototypes, -(feat_dim**-0.5), feat_dim**-0.5)

    def forward(self, targets: Tensor, anchors: Tensor, progress: Progress) -> Tensor:
        """The loss, 0-d, float32 (float64 for float64 embeddings).

        Args:
            targets: (B, D), normalized embeddings of the teacher.
            anchors: (V, B, D), normalized embeddings of the student.
            progress: position in the run.
        """
        directions = F.normalize(self.prototypes, dim=1)
        scores = anchors @ directions.T
        with torch.no_grad():
            tau = self.target_temperature
            teacher = tau * F.log_softmax(targets @ directions.T / tau, dim=1)  # the iteration starts at probabilities
            center = None
            if self.sinkhorn_iterations:
                center = sinkhorn_center(teacher, tau, self.sinkhorn_iterations, group=distributed.group())
        losses = [soft_cross_entropy(each, teacher, self.temperature, tau, center) for each in scores]
        own = F.softmax(scores / self.temperature, dim=-1).mean(dim=(0, 1))
        mean = distributed.all_reduce_mean_with_gradient(own)
        entropy = torch.special.entr(mean).sum()
        weight = at(self.entropy_weight, progress)
        return torch.stack(losses).mean() + weight * (math.log(len(directions)) - entropy)


class MSN(Method):
    """Masked siamese network: predicts a teacher's prototypes of a whole crop from masked and small ones (arXiv
    2204.07141).

    It takes crops of one size or several: the first for the teacher, then large ones, of which patches are dropped,
    then the others.

    Args:
        backbone: the encoder to train.
        neck: projector on top of the backbone, such as DINONeck with a norm.
        head: prototypes and loss; its feat_dim must equal the neck's out_channels.
        momentum: EMA decay of the teacher, 0 to 1, or a schedule of it.
        masked_crops: number of crops, after the first, of which patches are dropped.
        patch_drop: share of their patches that is dropped, 0 to below 1.
    """

    compares_samples = True
    uncompiled = ("head",)  # collectives

    def __init__(
        self,
        backbone: VisionTransformer,
        neck: Neck,
        head: MSNHead,
        momentum: Number = MOMENTUM,
        masked_crops: int = 1,
        patch_drop: float = 0.15,
    ) -> None:
        super().__init__()
        neck.require_out_channels(head.feat_dim)
        require_fraction(momentum=momentum)
        require_positive(masked_crops=masked_crops)
        require_rate(patch_drop=patch_drop)
        self.backbone: VisionTransformer = backbone
        self.neck, self.head = neck, head
        self.teacher_backbone, self.teacher_neck = teacher_of(backbone), teacher_of(neck)
        self.momentum, self.masked_crops, self.patch_drop = momentum, masked_crops, patch_drop

    def embed(self, batch: Batch, progress: Progress) -> list[Tensor]:
        """The teacher's embedding of the first crop, without gradient; then the student's of the others."""
        first, *anchors = batch.crops()
        if len(anchors) < self.masked_crops:
            raise ValueError(f"data.views give {1 + len(anchors)} crop(s), expected more than masked_crops")
        with torch.no_grad():
            target = F.normalize(wide(self.teacher_neck(self.teacher_backbone(first)[-1])), dim=1)
        masked, others = torch.cat(anchors[: self.masked_crops]), passes(anchors[self.masked_crops :])
        visible = self._visible(masked, progress)
        outputs, *features = outputs_of_sizes(self.backbone, [masked, *others], visible=visible)
        features.insert(0, outputs[:, 0])
        embedded = F.normalize(wide(self.neck(torch.cat(features))), dim=1)
        return [target, *embedded.split(len(batch.index))]

    def compare(self, embedded: list[Tensor], progress: Progress) -> Loss:
        target, *anchors = embedded
        with torch.autocast(target.device.type, enabled=False):
            loss = self.head(target.detach(), torch.stack(anchors), progress)
        return Loss(loss, {"feature_std": feature_std(anchors[0])})

    def teachers(self, progress: Progress) -> list[tuple[nn.Module, nn.Module, float]]:
        momentum = at(self.momentum, progress)
        return [(self.teacher_backbone, self.backbone, momentum), (self.teacher_neck, self.neck, momentum)]

    def chance_loss(self) -> float:
        return math.log(len(self.head.prototypes))

    def _visible(self, images: Tensor, progress: Progress) -> Tensor:
        """(B, n), the patches that are left of each image; equal for all."""
        patches = (images.shape[-2] // self.backbone.patch_size) * (images.shape[-1] // self.backbone.patch_size)
        kept = max(1, int(patches * (1 - self.patch_drop)))
        places = torch.randperm(patches, generator=progress.generator())[:kept].sort().values
        return places.to(images.device, non_blocking=True).expand(len(images), -1)
