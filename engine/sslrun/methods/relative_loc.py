"""Relative patch location: predict the position of a patch relative to the center of its image.

Doersch, Gupta, Efros 2015 (arXiv 1505.05192), in MMSelfSup's form. Each of the eight outer patches of a 3 x 3 grid is
paired with the center. The features of a pair, outer patch first, are classified into the eight positions, row by row
(section 3 there). Each step uses all eight pairs of an image; the center is encoded once and its features repeated.

Outer patches and centers go through the backbone separately, as in MMSelfSup, and have separate BatchNorm statistics.
(Centers repeated eight times would have the same statistics.) Deviations from the paper, shared with MMSelfSup: ResNet,
an additional BatchNorm, random grayscale instead of color dropping. Deviations from MMSelfSup: images keep their aspect
ratio (its 1.x distorts them), and dropout masks are a function of seed, step and position in the global batch.
"""

import math
from typing import Any

import torch
from torch import Tensor

from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.nn.dropout import dropout_masks
from sslrun.nn.heads import ClsHead
from sslrun.nn.necks import RelativeLocNeck, pooled

PATCHES = 9
PAIRS = PATCHES - 1
CENTER = PATCHES // 2


class RelativeLoc(Method):
    """Predicts the position of an image patch relative to the center patch (arXiv 1505.05192).

    Its nine views are the patches of a RandomGridPatch.

    Args:
        backbone: the encoder to train; its input is one patch.
        neck: hidden layer on the concatenated features of two patches.
        head: classifier with 8 classes, one for each position beside the center.
    """

    num_views = PATCHES

    def __init__(self, backbone: Backbone, neck: RelativeLocNeck, head: ClsHead) -> None:
        super().__init__()
        if head.num_classes != PAIRS:
            raise ValueError(
                f"num_classes is {head.num_classes}, expected {PAIRS}: one for each place beside the center"
            )
        self.backbone, self.neck, self.head = backbone, neck, head

    def targets(self, batches: list[Batch], progress: Progress) -> list[Any]:
        """Dropout masks (8B, D), or None, of each micro-batch."""
        if self.neck.dropout == 0:
            return [None] * len(batches)
        samples, width = len(batches[0].index), self.neck.out_channels
        seed = progress.generator().initial_seed()
        device = batches[0].index.device
        masks = dropout_masks(len(batches), (samples, PAIRS * width), self.neck.dropout, seed, device)
        return [mask.unflatten(1, (PAIRS, width)).transpose(0, 1).flatten(0, 1) for mask in masks]

    def forward(self, batch: Batch, progress: Progress, targets: Tensor | None) -> Loss:
        patches, samples = batch.views[0], len(batch.index)
        if len(patches) != PATCHES * samples:
            raise ValueError(f"an image has {len(patches) // samples} views, expected {PATCHES} patches")
        before, center, after = patches.split([CENTER * samples, samples, CENTER * samples])
        outer_features = pooled(self.backbone(torch.cat([before, after]))[-1])
        center_features = pooled(self.backbone(center)[-1])
        pairs = torch.cat([outer_features, center_features.repeat(PAIRS, 1)], dim=1)
        labels = torch.arange(PAIRS, device=pairs.device).repeat_interleave(samples)
        loss, top1 = self.head(self.neck(pairs, targets), labels)
        return Loss(loss, {"top1_pct": 100 * top1})

    def chance_loss(self) -> float:
        return math.log(PAIRS)
