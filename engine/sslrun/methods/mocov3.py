"""MoCo v3: predict the other view's key among all keys of the batch; no queue.

Chen, Xie & He 2021 (arXiv 2104.02057), algorithm 1. For views 1 and 2 of an image, queries q = predictor(projector(
f(x))) and keys k = projector'(f'(x)) of a momentum encoder, all normalized; with L(q, k) the InfoNCE of eq. 1 over the
keys of the whole global batch, the loss is 2T (L(q1, k2) + L(q2, k1)).

The keys of all micro-batches and ranks are computed before any query, so every query is compared with all of them: the
loss is that of the whole global batch, with or without accumulation.

The momentum rises to 1 along half a cosine. Each view goes through the networks separately and has its own BatchNorm
statistics, as in the paper's code. Deviations: the momentum update runs after the step instead of before the next keys,
which gives the same sequence of weights; the momentum encoder has its own BatchNorm running statistics instead of a
copy of the student's, but training never reads them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.nn.argument_checks import require_fraction
from sslrun.nn.feature_std import feature_std
from sslrun.nn.heads import MoCoV3Head
from sslrun.nn.momentum import rising, teacher_of
from sslrun.nn.necks import Neck
from sslrun.nn.precision import wide
from sslrun.runtime.distributed import all_gather_rows, rank, world_size
from sslrun.scheduled import Number, at


class Keys(NamedTuple):
    """The keys that the queries of one micro-batch are compared with.

    Attributes:
        first: (N, D), normalized keys of the first views of the global batch, in its order.
        second: (N, D), normalized keys of the second views.
        own: (B,) int64, the rows of the micro-batch's own samples.
    """

    first: Tensor
    second: Tensor
    own: Tensor


class MoCoV3(Method):
    """Momentum contrast without a queue: the negatives are the keys of the global batch (arXiv 2104.02057).

    It takes two views of each image, and ResNets or vision transformers as backbone.

    Args:
        backbone: the encoder to train.
        neck: projector on top of the backbone.
        head: predictor on top of the neck, and contrastive loss. The key encoder has no predictor.
        base_momentum: EMA decay of the key encoder at the start of the run, 0 to 1; it rises to 1 at the end.
            Or a schedule of it.
    """

    num_views = 2

    def __init__(self, backbone: Backbone, neck: Neck, head: MoCoV3Head, base_momentum: Number = 0.99) -> None:
        super().__init__()
        head.check_fits(neck)
        require_fraction(base_momentum=base_momentum)
        self.backbone, self.neck, self.head = backbone, neck, head
        self.key_backbone, self.key_neck = teacher_of(backbone), teacher_of(neck)
        self.base_momentum = base_momentum

    def targets(self, batches: list[Batch], progress: Progress) -> list[Keys]:
        """The keys of the whole global batch, and for each micro-batch the rows of its own samples."""
        encoded = [[self._keys(view) for view in batch.crops()] for batch in batches]
        first, second = (all_gather_rows(torch.cat(keys)) for keys in zip(*encoded, strict=True))
        own = torch.arange(len(first), device=first.device).view(world_size(), len(batches), -1)[rank()]
        return [Keys(first, second, rows) for rows in own]

    def forward(self, batch: Batch, progress: Progress, targets: Keys) -> Loss:
        first, second = (self.neck(self.backbone(view)[-1]) for view in batch.crops())
        loss, queries = self.head(first, targets.second, targets.own)
        mirrored, _ = self.head(second, targets.first, targets.own)
        return Loss(loss + mirrored, {"feature_std": feature_std(queries)})

    def teachers(self, progress: Progress) -> list[tuple[nn.Module, nn.Module, float]]:
        momentum = at(rising(self.base_momentum), progress)
        return [(self.key_backbone, self.backbone, momentum), (self.key_neck, self.neck, momentum)]

    def _keys(self, images: Tensor) -> Tensor:
        return F.normalize(wide(self.key_neck(self.key_backbone(images)[-1])), dim=1)
