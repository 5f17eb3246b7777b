"""SimSiam: predict the other view's embedding through a stopped gradient; no negatives, no teacher.

Chen & He 2021 (arXiv 2011.10566), algorithm 1 and eq. 4: the loss is -(cos(p1, z2) + cos(p2, z1)) / 2, from -1 to 1. As
there, each view goes through the network separately and has its own BatchNorm statistics. The recipe sets that the
predictor keeps its learning rate (`fix_lr`) and that the projector's last norm has no scale and shift.
"""

from torch import Tensor

from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.nn.feature_std import feature_std
from sslrun.nn.heads import LatentPredictHead
from sslrun.nn.necks import Neck


class SimSiam(Method):
    """Predicts the other view's embedding, with neither negatives nor a momentum encoder (arXiv 2011.10566).

    It takes two views of each image.

    Args:
        backbone: the encoder to train.
        neck: projector on top of the backbone.
        head: predictor on top of the neck, and loss; the other view's embedding gets no gradient.
    """

    num_views = 2

    def __init__(self, backbone: Backbone, neck: Neck, head: LatentPredictHead) -> None:
        super().__init__()
        head.check_fits(neck)
        self.backbone, self.neck, self.head = backbone, neck, head

    def forward(self, batch: Batch, progress: Progress, targets: None) -> Loss:
        first, second = (self._embed(images) for images in batch.crops())
        loss = 0.5 * (self.head(first, second) + self.head(second, first))
        return Loss(loss, {"feature_std": feature_std(first)})

    def _embed(self, images: Tensor) -> Tensor:
        return self.neck(self.backbone(images)[-1])
