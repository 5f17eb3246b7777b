"""DINOv2: iBOT, with one head for class tokens and patches or two, whose class tokens keep apart from each other.

Oquab et al. 2023 (arXiv 2304.07193), section 4. The terms of class tokens and of masked patches are iBOT's
(`nn/masked_distillation.py`); with `centering = "sinkhorn"` in the heads, the rows of the global batch use all
prototypes equally. KoLeo (`nn/koleo.py`) is added for the class tokens of each large crop, before the head: for each,
the nearest other one of its group. A group is `koleo_group` consecutive samples of the global batch, so that the loss
does not depend on how the hardware divides a batch; the authors' groups are the samples of one GPU.

Deviations: the number of masked patches is fixed, as in DINOv3 (`BlockMask`). Centers: see `DINO`.
"""

from sslrun.nn.masked_distillation import MOMENTUM, MaskedDistillation
from sslrun.nn.necks import Neck
from sslrun.nn.self_distillation import DINOHead
from sslrun.nn.vit import VisionTransformer
from sslrun.scheduled import Number


class DINOv2(MaskedDistillation):
    """Self-distillation of class tokens and masked patches, with KoLeo between images (arXiv 2304.07193).

    It takes vision transformers, and crops of one size or several: large ones first, which have a `mask` in
    `data.views`.

    Args:
        backbone: the encoder to train, with mask_token and patch_tokens.
        neck: projector on top of the class token, up to the bottleneck, such as DINONeck.
        head: prototypes and loss of class tokens; its feat_dim must equal the neck's out_channels.
        koleo_group: number of consecutive samples of the global batch whose class tokens KoLeo compares with each
            other; it must divide data.samples_per_gpu. "${data.samples_per_gpu}" is the authors' choice.
        patch_neck: projector of the patches; by default that of the class tokens.
        patch_head: prototypes and loss of the patches; by default those of the class tokens.
        koleo_weight: weight of KoLeo, of each large crop, or a schedule of it; 0 for none.
        momentum: EMA decay of the teacher, 0 to 1, or a schedule of it.
        large_crops: number of crops, from the first, that the teacher sees; they have one size, and a mask.
        class_weight: weight of the loss of class tokens, or a schedule of it.
        patch_weight: weight of the loss of patches, or a schedule of it.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        neck: Neck,
        head: DINOHead,
        koleo_group: int,
        patch_neck: Neck | None = None,
        patch_head: DINOHead | None = None,
        koleo_weight: Number = 0.1,
        momentum: Number = MOMENTUM,
        large_crops: int = 2,
        class_weight: Number = 1.0,
        patch_weight: Number = 1.0,
    ) -> None:
        super().__init__(
            backbone, neck, head, patch_neck, patch_head, momentum, large_crops, class_weight, patch_weight,
            koleo_group, koleo_weight,
        )  # fmt: skip
