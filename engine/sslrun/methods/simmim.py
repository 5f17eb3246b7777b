"""SimMIM: the network sees a token in the place of hidden patches; one linear layer predicts their pixels.

Xie, Zhang, Cao, Lin, Bao, Yao, Dai, Hu 2021 (arXiv 2111.09886), section 3; where it is silent, the authors' code.
All patches go through the network, the hidden ones as a learned mask token with their positions. The loss is the mean
absolute error of the pixels of hidden patches; the targets are the normalized image. Squares of 32 x 32 pixels are
hidden as a whole (`cell_size` of the mask).

Deviations: the authors' ViT has relative positions that its blocks share, this one positions that are added. Where
images reach the step as bfloat16 (CUDA in mixed precision), the targets have its 8 bits. Their Swin transformer, whose
stages have fewer tokens than the mask has patches, is no backbone here.
"""

import torch
from torch import Tensor, nn

from sslrun.contract import Batch, Loss, Method, PatchMask, Progress
from sslrun.nn.decoders import HiddenPatchHead
from sslrun.nn.patches import patches_of, with_patches
from sslrun.nn.precision import wide
from sslrun.nn.vit import VisionTransformer, taken


class SimMIM(Method):
    """Predicts the pixels of hidden patches by one linear layer (arXiv 2111.09886).

    It takes one view of each image, with a mask (`mask` in `data.views`).

    Args:
        backbone: the encoder to train, with mask_token and patch_tokens.
    """

    num_views = 1
    needs_masks = True
    is_measured_by_knn = False

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone: VisionTransformer = backbone
        pixels = backbone.patch_size**2 * backbone.patch_embed.proj.in_channels
        self.head = HiddenPatchHead(backbone, pixels)
        assert backbone.mask_token is not None
        nn.init.trunc_normal_(backbone.mask_token, std=0.02)

    def forward(self, batch: Batch, progress: Progress, targets: None) -> Loss:
        (images,), (mask,) = batch.views, batch.masks
        assert mask is not None
        predicted, hidden = self.head.of_hidden(self.backbone, images, mask)
        target = taken(patches_of(images, self.backbone.patch_size), hidden)
        with torch.autocast(images.device.type, enabled=False):
            return Loss((wide(predicted) - wide(target)).abs().mean())

    def reconstructed(self, images: Tensor, mask: PatchMask) -> Tensor:
        predicted, hidden = self.head.of_hidden(self.backbone, images, mask)
        return with_patches(images, predicted, hidden, self.backbone.patch_size)
