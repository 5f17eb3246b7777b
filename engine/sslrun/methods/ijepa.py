"""I-JEPA: predict, from some patches of an image, what a momentum teacher gives for blocks of the others.

Assran et al. 2023 (arXiv 2301.08243), section 3; where the paper is silent, the authors' code. The backbone gets the
visible patches alone, the teacher the whole image. For each block of hidden patches a predictor gets the outputs of the
visible patches and a learned token at the place of each patch of the block. Targets are the teacher's outputs of these
patches, each normalized to mean 0 and variance 1 over its features (a LayerNorm without weights). The loss is the
smooth L1 distance, as a mean over patches, blocks and images. The momentum rises linearly.

Which patches are visible, and which are in the blocks, is the mask of the recipe's view, so it depends on seed, epoch
and position alone, and a loss is a mean over images: it does not depend on ranks or micro-batches. Deviations: the
backbone has a class token, which no loss asks for anything, so that its feature should be the mean of the patches'
outputs (global_pool = "avg"); those of `MultiBlockMask`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.contract import Batch, Loss, Method, PatchMask, Progress
from sslrun.errors import UsageError
from sslrun.nn.argument_checks import require_fraction
from sslrun.nn.decoders import PatchDecoder
from sslrun.nn.feature_std import feature_std
from sslrun.nn.momentum import teacher_of
from sslrun.nn.precision import wide
from sslrun.nn.vit import VisionTransformer, taken
from sslrun.scheduled import Number, Scheduled, at

MOMENTUM = Scheduled(schedule="linear", start=0.996, end=1.0)


class IJEPA(Method):
    """Predicts a momentum teacher's outputs of blocks of hidden patches from the visible ones (arXiv 2301.08243).

    It takes one view of each image, with a mask that has blocks, such as MultiBlockMask (`mask` in `data.views`).

    Args:
        backbone: the encoder to train, with patch_tokens = true.
        decoder: predicts the outputs of hidden patches, such as IJEPAPredictor; it is thrown away after training.
        momentum: EMA decay of the teacher, 0 to 1, or a schedule of it.
    """

    num_views = 1
    needs_masks = True

    def __init__(self, backbone: VisionTransformer, decoder: PatchDecoder, momentum: Number = MOMENTUM) -> None:
        super().__init__()
        require_fraction(momentum=momentum)
        if not backbone.patch_tokens:
            raise ValueError("the backbone of I-JEPA needs patch_tokens = true: the outputs of patches are the targets")
        decoder.require_patches_of(backbone)
        if decoder.out_channels != backbone.num_features:
            raise ValueError(
                f"the decoder predicts {decoder.out_channels} numbers for a patch, but the backbone gives "
                f"{backbone.num_features}"
            )
        self.backbone: VisionTransformer = backbone
        self.decoder, self.momentum = decoder, momentum
        self.teacher_backbone = teacher_of(backbone)

    def targets(self, batches: list[Batch], progress: Progress) -> list[Tensor]:
        """The teacher's normalized outputs for the patches of the blocks, (B, M, n, D), per micro-batch."""
        return [self._encoded(batch) for batch in batches]

    def forward(self, batch: Batch, progress: Progress, targets: Tensor) -> Loss:
        mask, blocks = _mask_of(batch)
        visible, _ = mask.places()
        outputs = self.backbone(batch.views[0], visible=visible)[-1]
        count = blocks.shape[1]
        predicted = self.decoder(
            outputs.repeat_interleave(count, dim=0), visible.repeat_interleave(count, dim=0), blocks.flatten(0, 1)
        )
        with torch.autocast(outputs.device.type, enabled=False):
            loss = F.smooth_l1_loss(wide(predicted), targets.flatten(0, 1))
        return Loss(loss, {"feature_std": feature_std(outputs[:, -visible.shape[1] :].mean(dim=1))})

    def teachers(self, progress: Progress) -> list[tuple[nn.Module, nn.Module, float]]:
        return [(self.teacher_backbone, self.backbone, at(self.momentum, progress))]

    def _encoded(self, batch: Batch) -> Tensor:
        _, blocks = _mask_of(batch)
        outputs = wide(self.teacher_backbone(batch.views[0])[0].flatten(2).transpose(1, 2))
        normalized = F.layer_norm(outputs, outputs.shape[-1:])
        return taken(normalized, blocks.flatten(1)).unflatten(1, blocks.shape[1:])


def _mask_of(batch: Batch) -> tuple[PatchMask, Tensor]:
    """The mask of the batch's only view, and its blocks."""
    (mask,) = batch.masks
    assert mask is not None
    if mask.blocks is None:
        raise UsageError("I-JEPA needs a mask with blocks to predict, such as MultiBlockMask")
    return mask, mask.blocks
