"""BYOL: predict the embedding that a momentum teacher gives another view; there are no negatives.

Grill et al. 2020 (arXiv 2006.07733), section 3. The loss is 2 (-cos(q(z1), t2) - cos(q(z2), t1)), from -4 to 4, as in
MMSelfSup; the paper's loss, eq. 2 and its mirror image, is larger by 4. The gradients are equal, and curves can be
compared with MMSelfSup's. The teacher's momentum rises along a cosine (section 3.2 there).

As in the paper's code, each view goes through the network separately: the two are augmented differently and have their
own BatchNorm statistics. The teacher runs in training mode, with its own statistics.
"""

from torch import Tensor, nn

from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.nn.argument_checks import require_fraction
from sslrun.nn.feature_std import feature_std
from sslrun.nn.heads import LatentPredictHead
from sslrun.nn.momentum import rising, teacher_of
from sslrun.nn.necks import Neck
from sslrun.scheduled import Number, at


class BYOL(Method):
    """Bootstrap your own latent: predicts a momentum teacher's embedding of another view (arXiv 2006.07733).

    It takes two views of each image and uses no negatives.

    Args:
        backbone: the encoder to train.
        neck: projector on top of the backbone.
        head: predictor on top of the neck, and loss. The teacher has no predictor.
        base_momentum: EMA decay of the teacher at the start of the run, 0 to 1; or a schedule of it.
        end_momentum: EMA decay of the teacher at the end of the run, 0 to 1, where base_momentum has no schedule.
    """

    num_views = 2

    def __init__(
        self,
        backbone: Backbone,
        neck: Neck,
        head: LatentPredictHead,
        base_momentum: Number = 0.99,
        end_momentum: float = 1.0,
    ) -> None:
        super().__init__()
        head.check_fits(neck)
        require_fraction(base_momentum=base_momentum, end_momentum=end_momentum)
        self.backbone, self.neck, self.head = backbone, neck, head
        self.target_backbone, self.target_neck = teacher_of(backbone), teacher_of(neck)
        self.base_momentum, self.end_momentum = base_momentum, end_momentum

    def targets(self, batches: list[Batch], progress: Progress) -> list[tuple[Tensor, Tensor]]:
        """The teacher's projections (B, D) of the first and of the second views, per micro-batch."""
        return [self._pair(self.target_backbone, self.target_neck, batch) for batch in batches]

    def forward(self, batch: Batch, progress: Progress, targets: tuple[Tensor, Tensor]) -> Loss:
        first, second = self._pair(self.backbone, self.neck, batch)
        target_of_first, target_of_second = targets
        loss = 2 * (self.head(first, target_of_second) + self.head(second, target_of_first))
        return Loss(loss, {"feature_std": feature_std(first)})

    def teachers(self, progress: Progress) -> list[tuple[nn.Module, nn.Module, float]]:
        momentum = at(rising(self.base_momentum, self.end_momentum), progress)
        return [(self.target_backbone, self.backbone, momentum), (self.target_neck, self.neck, momentum)]

    def _pair(self, backbone: Backbone, neck: Neck, batch: Batch) -> tuple[Tensor, Tensor]:
        first, second = batch.crops()
        return neck(backbone(first)[-1]), neck(backbone(second)[-1])
