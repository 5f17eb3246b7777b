"""DenseCL: MoCo v2 on whole images and, by a second branch, on every cell of the feature map.

Wang et al. 2021 (arXiv 2011.09157): the global loss is MoCo's (eq. 1); the dense loss (eq. 2) does the same for each of
the S^2 cells of a query's map, whose positive is the key's cell with the most similar backbone feature (eq. 3), and
whose negatives are a queue of pooled dense keys of other images. The total is (1 - lambda) global + lambda dense
(eq. 4).

The paper keeps lambda at 0 for the first 1000 iterations; the published recipe does not, nor does this class by default
(`loss_lambda_start_iters`). As in MoCo, the key encoder gets the images of the whole global batch shuffled over the
BatchNorm groups. Deviation: the momentum update runs after the step instead of before the next forward pass, which
gives the same sequence of weights.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.nn.argument_checks import require_fraction, require_not_negative
from sslrun.nn.feature_std import feature_std
from sslrun.nn.heads import Head
from sslrun.nn.momentum import encode_shuffled, teacher_of
from sslrun.nn.necks import DenseCLNeck
from sslrun.nn.precision import wide
from sslrun.nn.queue_and_bank import Queue
from sslrun.scheduled import Number, at


class Keys(NamedTuple):
    """The key encoder's outputs for the second views; every vector is normalized, float32 (float64 in that precision).

    Attributes:
        whole: (B, D), keys of the global branch.
        dense: (B, D, S^2), keys of the dense branch.
        pooled: (B, D), the dense keys averaged over their cells before normalization.
        cells: (B, C, S^2), the backbone's feature map.
    """

    whole: Tensor
    dense: Tensor
    pooled: Tensor
    cells: Tensor


class DenseCL(Method):
    """MoCo v2 on whole images and, at the same time, on every cell of the feature map (arXiv 2011.09157).

    It takes two views of each image.

    Args:
        backbone: the encoder to train.
        neck: global and dense projector on top of the backbone.
        head: contrastive loss of both branches.
        queue_len: number K of negative keys of each branch.
        feat_dim: dimension D of the embeddings; must equal the neck's out_channels.
        momentum: EMA decay of the key encoder, 0 to 1, or a schedule of it.
        loss_lambda: weight of the dense loss, 0 to 1; the global loss has the weight 1 - loss_lambda.
        loss_lambda_start_iters: number of optimizer steps at the start of the run that use the global loss alone.
    """

    num_views = 2

    def __init__(
        self,
        backbone: Backbone,
        neck: DenseCLNeck,
        head: Head,
        queue_len: int = 65536,
        feat_dim: int = 128,
        momentum: Number = 0.999,
        loss_lambda: float = 0.5,
        loss_lambda_start_iters: int = 0,
    ) -> None:
        super().__init__()
        neck.require_out_channels(feat_dim)
        require_fraction(momentum=momentum, loss_lambda=loss_lambda)
        require_not_negative(loss_lambda_start_iters=loss_lambda_start_iters)
        self.backbone, self.neck, self.head = backbone, neck, head
        self.key_backbone, self.key_neck = teacher_of(backbone), teacher_of(neck)
        self.queue, self.dense_queue = Queue(queue_len, feat_dim), Queue(queue_len, feat_dim)
        self.momentum = momentum
        self.loss_lambda, self.loss_lambda_start_iters = loss_lambda, loss_lambda_start_iters

    def targets(self, batches: list[Batch], progress: Progress) -> list[Keys]:
        """Keys per micro-batch, from images shuffled over the whole global batch."""
        encoded = encode_shuffled(self._keys, [batch.crops()[1] for batch in batches], progress.generator())
        return [Keys(*keys) for keys in encoded]

    def forward(self, batch: Batch, progress: Progress, targets: Keys) -> Loss:
        features = self.backbone(batch.crops()[0])[-1]
        queries, dense, _ = self.neck(features)
        loss, top1 = self.head(queries, targets.whole, self.queue.rows)
        dense_loss, dense_top1 = self.head(_rows(dense), _rows(matched(features, targets)), self.dense_queue.rows)
        weight = self.loss_lambda if progress.step >= self.loss_lambda_start_iters else 0.0
        metrics = {
            "global_loss": loss.detach(),
            "dense_loss": dense_loss.detach(),
            "top1_pct": 100 * top1,
            "dense_top1_pct": 100 * dense_top1,
            "feature_std": feature_std(queries),
        }
        carry = {"keys": targets.whole, "dense_keys": targets.pooled}
        return Loss((1 - weight) * loss + weight * dense_loss, metrics, carry)

    def teachers(self, progress: Progress) -> list[tuple[nn.Module, nn.Module, float]]:
        momentum = at(self.momentum, progress)
        return [(self.key_backbone, self.backbone, momentum), (self.key_neck, self.neck, momentum)]

    def after_step(self, progress: Progress, carry: dict[str, Tensor]) -> None:
        self.queue.push(carry["keys"])
        self.dense_queue.push(carry["dense_keys"])

    def chance_loss(self) -> float:
        return math.log(len(self.queue.rows) + 1)

    def _keys(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.key_backbone(images)[-1]
        outputs = (*self.key_neck(features), features.flatten(2))
        return tuple(F.normalize(wide(output), dim=1) for output in outputs)


@torch.no_grad()
def matched(features: Tensor, keys: Keys) -> Tensor:
    """(B, D, S^2): for each cell of the queries' feature maps (B, C, S, S), the dense key of the most similar cell."""
    with torch.autocast(features.device.type, enabled=False):  # rounded similarities would tie
        # The length of a query cell is the same for all key cells and does not change the argmax.
        similarity = torch.einsum("bcq,bck->bqk", features.flatten(2).to(keys.cells.dtype), keys.cells)
    match = similarity.argmax(dim=2).unsqueeze(1)
    return keys.dense.gather(2, match.expand(-1, keys.dense.shape[1], -1))


def _rows(dense: Tensor) -> Tensor:
    """(B, D, S^2) as (B x S^2, D)."""
    return dense.transpose(1, 2).flatten(0, 1)
