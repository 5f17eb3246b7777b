"""A stand-in for DINO (Caron et al. 2021, arXiv 2104.14294), which sslrun does not have: its work, not its training.

A student sees 2 large and 8 small crops, a momentum encoder the 2 large ones; a head ends in 65,536 prototypes. Left
out are the center, the schedules and the normalization of the last layer, whose work is small.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.contract import Batch, Loss, Method, Progress
from sslrun.nn.momentum import teacher_of
from sslrun.nn.vit import VisionTransformer
from sslrun.recipe import Recipe

PROTOTYPES = 65_536


class DinoLike(Method):
    """Cross-entropy between a teacher's and a student's prototypes, over crops of 224 and 96 pixels.

    Args:
        arch: of the vision transformer, as there.
    """

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.backbone = VisionTransformer(arch, frozen_patch_embed=False)  # type: ignore[arg-type]
        self.small = VisionTransformer(arch, img_size=96, frozen_patch_embed=False)  # type: ignore[arg-type]
        for name in ("patch_embed", "cls_token", "blocks", "norm"):  # all weights but the positions are shared
            setattr(self.small, name, getattr(self.backbone, name))
        width = self.backbone.num_features
        layers = [nn.Linear(width, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)]
        self.head = nn.Sequential(*layers, nn.Linear(256, PROTOTYPES, bias=False))
        self.key_backbone, self.key_head = teacher_of(self.backbone), teacher_of(self.head)

    def targets(self, batches: list[Batch], progress: Progress) -> list[Tensor]:
        """(2B, K): the teacher's distributions of the large crops of each micro-batch."""
        return [self.key_head(self.key_backbone(batch.views[0])[-1]).softmax(1) for batch in batches]

    def forward(self, batch: Batch, progress: Progress, targets: Tensor) -> Loss:
        large, small = (net(views)[-1] for net, views in zip((self.backbone, self.small), batch.views, strict=True))
        crops = F.log_softmax(self.head(torch.cat([large, small])), dim=1).split(len(batch.index))
        wanted = targets.split(len(batch.index))
        losses = [-(q * p).sum(1).mean() for i, q in enumerate(wanted) for j, p in enumerate(crops) if i != j]
        return Loss(torch.stack(losses).mean())

    def teachers(self, progress: Progress) -> list[tuple[nn.Module, nn.Module, float]]:
        return [(self.key_backbone, self.backbone, 0.996), (self.key_head, self.head, 0.996)]


def dino_like(recipe: Recipe, arch: str) -> Recipe:
    """SwAV's recipe, which has large and small crops, with DINO's network and 8 small crops."""
    large, small = recipe.data.views
    with torch.device("meta"):
        model = DinoLike(arch)
    return replace(recipe, model=model, data=replace(recipe.data, views=[large, replace(small, num_views=8)]))
