"""iBOT: DINO's self-distillation of class tokens, and the same for masked patches.

Zhou et al. 2022 (arXiv 2111.07832), section 3. Student and teacher share the form of a vision transformer with a head;
the student sees large crops with blocks of masked patches. The loss is class_weight times DINO's, with masked large
crops, plus patch_weight times the cross-entropy of masked patches (`nn/masked_distillation.py`). As in the paper the
patches use the head of the class token unless a head of their own is given; the two centers are apart in either case.

Deviations: the center of patches is the mean over masked patches, as in DINOv2; the authors take all patches, for which
the projector of the teacher would run over all of them. Which crops are masked, and how much, is shared out evenly over
the samples of a micro-batch (`BlockMask`) instead of drawn for each crop. Centers: see `DINO`.
"""

from sslrun.nn.masked_distillation import MaskedDistillation
from sslrun.nn.necks import Neck
from sslrun.nn.self_distillation import MOMENTUM, DINOHead
from sslrun.nn.vit import VisionTransformer
from sslrun.scheduled import Number


class IBOT(MaskedDistillation):
    """Self-distillation of class tokens and of masked patches (arXiv 2111.07832).

    It takes vision transformers, and crops of one size or several: large ones first, which have a `mask` in
    `data.views`.

    Args:
        backbone: the encoder to train, with mask_token and patch_tokens.
        neck: projector on top of the backbone, up to the bottleneck, such as DINONeck.
        head: prototypes and loss; its feat_dim must equal the neck's out_channels.
        patch_neck: projector of the patches; by default that of the class tokens.
        patch_head: prototypes and loss of the patches; by default those of the class tokens.
        momentum: EMA decay of the teacher, 0 to 1, or a schedule of it.
        large_crops: number of crops, from the first, that the teacher sees; they have one size, and a mask.
        class_weight: weight of the loss of class tokens, or a schedule of it.
        patch_weight: weight of the loss of patches, or a schedule of it: it may start late.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        neck: Neck,
        head: DINOHead,
        patch_neck: Neck | None = None,
        patch_head: DINOHead | None = None,
        momentum: Number = MOMENTUM,
        large_crops: int = 2,
        class_weight: Number = 1.0,
        patch_weight: Number = 1.0,
    ) -> None:
        super().__init__(
            backbone, neck, head, patch_neck, patch_head, momentum, large_crops, class_weight, patch_weight
        )
