"""DINOv3: DINOv2 with a weight of small crops, and with Gram anchoring, which keeps the features of patches from
getting worse in long runs.

Siméoni et al. 2025 (arXiv 2508.10104), sections 3.2, 4 and 5.1, and the authors' code. For each large crop, the patches
of the student, some of which are masked, are to be as similar to each other as the anchor finds the same patches
(`nn/gram.py`). The anchor is the teacher's network of an earlier step. It sees the crop at `gram_scale` times the side,
and its map is resized to the student's grid (bicubic, without antialiasing).

`data.views` give the large crops at the side that the anchor sees; for student and teacher they are reduced by
`gram_scale` (bicubic, with antialiasing). The patch_size of their masks is that of the backbone times `gram_scale`.

Deviations: color and blur are drawn once for a crop of both sizes (the authors' default; their 7B network's anchor sees
the crop without them). One pair of sizes in a run, where the authors' high-resolution stage draws one of five. Class
tokens of small crops have no norm of their own (that of the 7B network). The number of masked patches is fixed
(`BlockMask`). Centers: see `DINO`.
"""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.contract import Batch, Loss, Pooled, Progress
from sslrun.nn.argument_checks import require_not_negative
from sslrun.nn.gram import gram_loss
from sslrun.nn.masked_distillation import MOMENTUM, MaskedDistillation, Targets, mask_of
from sslrun.nn.momentum import teacher_of
from sslrun.nn.necks import Neck
from sslrun.nn.precision import wide
from sslrun.nn.self_distillation import DINOHead
from sslrun.nn.vit import VisionTransformer
from sslrun.scheduled import Number, at, extremes


class DINOv3(MaskedDistillation):
    """Self-distillation of class tokens and masked patches, with KoLeo and Gram anchoring (arXiv 2508.10104).

    It takes vision transformers, and crops of one size or several: large ones first, which have a `mask` in
    `data.views`.

    Args:
        backbone: the encoder to train, with mask_token and patch_tokens.
        neck: projector on top of the class token, up to the bottleneck, such as DINONeck.
        head: prototypes and loss of class tokens; its feat_dim must equal the neck's out_channels.
        patch_neck: projector of the patches.
        patch_head: prototypes and loss of the patches.
        koleo_group: number of consecutive samples of the global batch whose class tokens KoLeo compares with each
            other; it must divide data.samples_per_gpu. "${data.samples_per_gpu}" is the authors' choice.
        koleo_weight: weight of KoLeo, of each large crop, or a schedule of it; 0 for none.
        momentum: EMA decay of the teacher, 0 to 1, or a schedule of it.
        large_crops: number of crops, from the first, that the teacher sees; they have one size, and a mask.
        class_weight: weight of the loss of class tokens, or a schedule of it.
        patch_weight: weight of the loss of patches, or a schedule of it.
        small_weight: factor of the terms of class tokens whose student sees a small crop, or a schedule of it.
        gram_weight: weight of Gram anchoring, or a schedule of it; 0 for none, and then there is no anchor.
        gram_scale: side of the large crops in `data.views`, which the anchor sees, divided by that which student and
            teacher see, 1 or more; also where gram_weight is 0.
        gram_start: number of optimizer steps after which the anchor becomes the teacher; until then, and with 0, it is
            the teacher that the run begins with, which `load_from` may give.
        gram_interval: number of optimizer steps after which it becomes the teacher again; 0 for never.
        gram_refreshes: how often it becomes the teacher again, at most.
    """

    gram_backbone: VisionTransformer | None

    def __init__(
        self,
        backbone: VisionTransformer,
        neck: Neck,
        head: DINOHead,
        patch_neck: Neck,
        patch_head: DINOHead,
        koleo_group: int,
        koleo_weight: Number = 0.1,
        momentum: Number = MOMENTUM,
        large_crops: int = 2,
        class_weight: Number = 1.0,
        patch_weight: Number = 1.0,
        small_weight: Number = 1.0,
        gram_weight: Number = 0.0,
        gram_scale: float = 1.0,
        gram_start: int = 0,
        gram_interval: int = 0,
        gram_refreshes: int = 3,
    ) -> None:
        super().__init__(
            backbone, neck, head, patch_neck, patch_head, momentum, large_crops, class_weight, patch_weight,
            koleo_group, koleo_weight, small_weight,
        )  # fmt: skip
        require_not_negative(gram_weight=gram_weight, gram_start=gram_start)
        require_not_negative(gram_interval=gram_interval, gram_refreshes=gram_refreshes)
        if not gram_scale >= 1:
            raise ValueError(f"gram_scale is {gram_scale}, expected 1 or more")
        self.gram_weight, self.gram_scale, self.gram_start = gram_weight, gram_scale, gram_start
        self.gram_interval, self.gram_refreshes = gram_interval, gram_refreshes
        self.gram_backbone = teacher_of(backbone) if any(extremes(gram_weight)) else None

    def targets(self, batches: list[Batch], progress: Progress) -> list[Targets]:
        targets = super().targets([self._reduced(batch) for batch in batches], progress)
        if not at(self.gram_weight, progress):
            return targets
        return [each._replace(anchored=self._anchored(batch)) for each, batch in zip(targets, batches, strict=True)]

    def forward(self, batch: Batch, progress: Progress, targets: Targets) -> Loss:
        loss, patches = self.losses(self._reduced(batch), progress, targets)
        if targets.anchored is None:
            return loss
        difference = gram_loss(patches, targets.anchored)
        value = loss.value + at(self.gram_weight, progress) * difference
        metrics: dict[str, Tensor | Pooled] = {"gram_loss": difference.detach()}
        return Loss(value, loss.metrics | metrics, loss.carry)

    def teachers(self, progress: Progress) -> list[tuple[nn.Module, nn.Module, float]]:
        pairs = super().teachers(progress)
        if self.gram_backbone is not None and self._becomes_teacher(progress.step):
            pairs.append((self.gram_backbone, self.teacher_backbone, 0.0))
        return pairs

    def _becomes_teacher(self, step: int) -> bool:
        since = step - self.gram_start
        if not self.gram_interval:
            return since == 0
        return since >= 0 and since % self.gram_interval == 0 and since // self.gram_interval <= self.gram_refreshes

    def _reduced(self, batch: Batch) -> Batch:
        """The batch with the large crops at the side that student and teacher see."""
        if self.gram_scale == 1:
            return batch
        mask_of(batch, self.large_crops)  # the groups that have a mask are those of the large crops
        groups = zip(batch.views, batch.masks, strict=True)
        return replace(batch, views=[self._smaller(views) if mask is not None else views for views, mask in groups])

    def _smaller(self, images: Tensor) -> Tensor:
        side = [round(length / self.gram_scale) for length in images.shape[-2:]]
        return F.interpolate(wide(images), side, mode="bicubic", antialias=True).to(images.dtype)

    def _anchored(self, batch: Batch) -> Tensor:
        assert self.gram_backbone is not None
        maps, _ = self.gram_backbone(self._images(batch))
        grid = [round(length / self.gram_scale) for length in maps.shape[-2:]]
        if grid != list(maps.shape[-2:]):
            maps = F.interpolate(wide(maps), grid, mode="bicubic", align_corners=False)
        return maps.flatten(2).transpose(1, 2).clone()  # with CUDA graphs the next micro-batch overwrites the map
