"""Rotation prediction: predict by how many quarter turns an image is rotated.

Gidaris, Singh, Komodakis 2018 (arXiv 1803.07728), without deviation. The loss is eq. 2 and 3 there: cross-entropy over
the four rotations; a batch contains every image in all four. Images are rotated on the device by exchanging and
reversing axes, so no pixel is interpolated. A BatchNorm group contains all four rotations of its samples.
"""

import math

import torch
from torch import Tensor

from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.nn.heads import ClsHead

TURNS = 4


class RotationPred(Method):
    """Predicts whether an image is rotated by 0, 90, 180 or 270 degrees (arXiv 1803.07728).

    It takes one view of each image.

    Args:
        backbone: the encoder to train.
        head: classifier with 4 classes: counter-clockwise rotations by 0, 90, 180 and 270 degrees.
    """

    num_views = 1

    def __init__(self, backbone: Backbone, head: ClsHead) -> None:
        super().__init__()
        if head.num_classes != TURNS:
            raise ValueError(f"num_classes is {head.num_classes}, expected {TURNS}: one for each quarter turn")
        self.backbone, self.head = backbone, head

    def forward(self, batch: Batch, progress: Progress, targets: None) -> Loss:
        images = turned(batch.views[0])
        labels = torch.arange(TURNS, device=images.device).repeat_interleave(len(images) // TURNS)
        loss, top1 = self.head(self.backbone(images)[-1], labels)
        return Loss(loss, {"top1_pct": 100 * top1})

    def chance_loss(self) -> float:
        return math.log(TURNS)


def turned(images: Tensor) -> Tensor:
    """Square images (B, C, S, S) in all four rotations, (4 * B, C, S, S), grouped by rotation as views are."""
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"views are {images.shape[2]}x{images.shape[3]}, expected squares")
    turns = [torch.rot90(images, turn, (2, 3)) for turn in range(TURNS)]
    return torch.cat([turn.contiguous(memory_format=torch.channels_last) for turn in turns])
