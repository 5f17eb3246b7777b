"""DINO: predict from each crop of an image the distribution over prototypes that a teacher gives a large crop.

Caron et al. 2021 (arXiv 2104.14294), algorithm 1 with multi-crop (eq. 3). Prototypes are the last layer of the
projector, with weights of unit length. Teacher's scores are centered (section 3.1): the center is a moving average of
their mean over the global batch, c <- m c + (1 - m) mean, without gradient. The loss is the mean over samples and over
all pairs of a large crop of the teacher and another crop of the student; the student's scores are never stored
(`sslkernels.prototype_cross_entropy`).

Crops of one size share BatchNorm statistics, as in the authors' code; the neck sees all crops in one call. Deviations:
the mean of the scores is that of the batch's embeddings times the teacher's prototypes after their momentum update
instead of before it, which is the same but for (1 - momentum) of one step's change. Scores are float32 under autocast
too.
"""

from torch import Tensor, nn

from sslrun.contract import Backbone, Batch, Loss, Method, Pooled, Progress
from sslrun.nn.argument_checks import require_fraction, require_positive
from sslrun.nn.feature_std import feature_std
from sslrun.nn.momentum import teacher_of
from sslrun.nn.necks import Neck
from sslrun.nn.self_distillation import MOMENTUM, DINOHead, crops_embedded
from sslrun.scheduled import Number, at

# The teacher's embeddings of the large crops, (G, B, D), normalized, and what is subtracted from their scores, (K,).
Targets = tuple[Tensor, Tensor]


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

    uncompiled = ("head",)  # a temperature that changes would be compiled anew; its operations are kernels already

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

    def targets(self, batches: list[Batch], progress: Progress) -> list[Targets]:
        large = [
            crops_embedded(
                self.teacher_backbone, self.teacher_neck, batch.crops()[: self.large_crops], len(batch.index)
            )
            for batch in batches
        ]
        center = self.head.center_of(large, self.teacher_prototypes(), progress, self.head.center)
        return [(each, center) for each in large]

    def forward(self, batch: Batch, progress: Progress, targets: Targets) -> Loss:
        crops = crops_embedded(self.backbone, self.neck, batch.views, len(batch.index))
        if len(crops) < max(2, self.large_crops):
            raise ValueError(f"data.views give {len(crops)} crop(s), expected two or more, and large_crops")
        large, center = targets
        scores = self.head.scores(large, self.teacher_prototypes())
        loss = self.head(crops, scores, center, progress)
        metrics: dict[str, Tensor | Pooled] = {"feature_std": feature_std(crops[0])}
        carry = {"targets": large.transpose(0, 1).flatten(1)}
        return Loss(loss, metrics | self.head.signs(scores, center), carry)

    def teachers(self, progress: Progress) -> list[tuple[nn.Module, nn.Module, float]]:
        momentum = at(self.momentum, progress)
        return [
            (self.teacher_backbone, self.backbone, momentum),
            (self.teacher_neck, self.neck, momentum),
            (self.teacher_prototypes, self.head.prototypes, momentum),
        ]

    def after_step(self, progress: Progress, carry: dict[str, Tensor]) -> None:
        targets = carry["targets"].unflatten(1, (self.large_crops, -1)).flatten(0, 1)
        total, count = targets.sum(dim=0), targets.new_full((), len(targets))
        self.head.follow(self.head.center, total, count, self.teacher_prototypes(), progress)

    def chance_loss(self) -> float:
        return self.head.chance_loss
