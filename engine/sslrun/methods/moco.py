"""MoCo and MoCo v2: contrastive learning with a queue of keys from a momentum encoder.

He et al. 2020 (arXiv 1911.05722), algorithm 1; Chen et al. 2020 (arXiv 2003.04297) add the MLP projector, the blur and
the cosine schedule, which the recipe sets. The loss is eq. 1 of the first paper.

The key encoder gets the images of the whole global batch shuffled over the BatchNorm groups (section 3.3 there:
"shuffling BN", `sslrun.nn.momentum.encode_shuffled`). Deviation: the momentum update runs after the step instead of
before the next forward pass, which gives the same sequence of weights.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.nn.argument_checks import require_fraction
from sslrun.nn.feature_std import feature_std
from sslrun.nn.heads import Head
from sslrun.nn.momentum import encode_shuffled, teacher_of
from sslrun.nn.necks import Neck
from sslrun.nn.precision import wide
from sslrun.nn.queue_and_bank import Queue
from sslrun.scheduled import Number, at


class MoCo(Method):
    """Momentum contrast: matches queries to keys of a momentum encoder, with a queue of negatives (arXiv 1911.05722).

    It takes two views of each image. MoCo v2 (arXiv 2003.04297) is this class with the MoCoV2Neck.

    Version 2 (arXiv 2003.04297) has another projector, blur and a cosine schedule, which its recipe states.

    Args:
        backbone: the encoder to train.
        neck: projector on top of the backbone.
        head: contrastive loss.
        queue_len: number K of negative keys.
        feat_dim: dimension D of the embeddings; must equal the neck's out_channels.
        momentum: EMA decay of the key encoder, 0 to 1, or a schedule of it.
    """

    num_views = 2

    def __init__(
        self,
        backbone: Backbone,
        neck: Neck,
        head: Head,
        queue_len: int = 65536,
        feat_dim: int = 128,
        momentum: Number = 0.999,
    ) -> None:
        super().__init__()
        neck.require_out_channels(feat_dim)
        require_fraction(momentum=momentum)
        self.backbone, self.neck, self.head = backbone, neck, head
        self.key_backbone, self.key_neck = teacher_of(backbone), teacher_of(neck)
        self.queue = Queue(queue_len, feat_dim)
        self.momentum = momentum

    def targets(self, batches: list[Batch], progress: Progress) -> list[Tensor]:
        """Keys (B, D), normalized, per micro-batch, from images shuffled over the whole global batch."""
        encoded = encode_shuffled(self._keys, [batch.crops()[1] for batch in batches], progress.generator())
        return [keys for (keys,) in encoded]

    def forward(self, batch: Batch, progress: Progress, targets: Tensor) -> Loss:
        queries = self.neck(self.backbone(batch.crops()[0])[-1])
        loss, top1 = self.head(queries, targets, self.queue.rows)
        return Loss(loss, {"top1_pct": 100 * top1, "feature_std": feature_std(queries)}, {"keys": targets})

    def teachers(self, progress: Progress) -> list[tuple[nn.Module, nn.Module, float]]:
        momentum = at(self.momentum, progress)
        return [(self.key_backbone, self.backbone, momentum), (self.key_neck, self.neck, momentum)]

    def after_step(self, progress: Progress, carry: dict[str, Tensor]) -> None:
        self.queue.push(carry["keys"])

    def chance_loss(self) -> float:
        return math.log(len(self.queue.rows) + 1)

    def _keys(self, images: Tensor) -> tuple[Tensor]:
        return (F.normalize(wide(self.key_neck(self.key_backbone(images)[-1])), dim=1),)
