"""MAE: the network sees a quarter of the patches; a small decoder predicts the pixels of the others.

He, Chen, Xie, Li, Dollár, Girshick 2021 (arXiv 2111.06377), section 3; where the paper is silent, the authors' code.
The encoder gets the visible patches and the class token; the decoder gets its outputs and a learned token at the place
of each hidden patch. The loss is the mean over hidden patches of the squared error of their pixels. Targets are the
normalized image, cut into patches whose pixels are in the order row, column, channel; with `norm_pix`, each patch has
its mean subtracted and is divided by its standard deviation (unbiased, 1e-6 added to the variance). A network that
predicts the mean of each patch then has a loss near 1. Deviation: where images reach the step as bfloat16
(CUDA in mixed precision), the targets have its 8 bits.

Which patches are hidden is the mask of the recipe's view, so it depends on seed, epoch and position alone.
"""

import torch
from torch import Tensor

from sslrun.contract import Batch, Loss, Method, PatchMask, Progress
from sslrun.nn.decoders import PatchDecoder
from sslrun.nn.patches import normalized, patches_of, unnormalized, with_patches
from sslrun.nn.precision import wide
from sslrun.nn.vit import VisionTransformer, taken


class MAE(Method):
    """Masked autoencoder (arXiv 2111.06377): predicts the pixels of hidden patches from the visible ones.

    It takes one view of each image, with a mask (`mask` in `data.views`).

    Args:
        backbone: the encoder to train.
        decoder: predicts the pixels; it is thrown away after training.
        norm_pix: whether the pixels of each target patch are normalized by their mean and standard deviation.
    """

    num_views = 1
    needs_masks = True
    is_measured_by_knn = False

    def __init__(self, backbone: VisionTransformer, decoder: PatchDecoder, norm_pix: bool = True) -> None:
        super().__init__()
        self.backbone: VisionTransformer = backbone
        self.decoder, self.norm_pix = decoder, norm_pix
        decoder.require_patches_of(backbone)

    def forward(self, batch: Batch, progress: Progress, targets: None) -> Loss:
        (images,), (mask,) = batch.views, batch.masks
        assert mask is not None
        visible, hidden = mask.places()
        target = taken(patches_of(images, self.backbone.patch_size), hidden)
        predicted = self.decoder(self.backbone(images, visible=visible)[-1], visible, hidden)
        with torch.autocast(images.device.type, enabled=False):
            target = normalized(wide(target)) if self.norm_pix else wide(target)
            return Loss((wide(predicted) - target).square().mean())

    def reconstructed(self, images: Tensor, mask: PatchMask) -> Tensor:
        """With `norm_pix`, mean and standard deviation of each hidden patch are those of the image, as in the authors'
        figures: the network does not predict them."""
        visible, hidden = mask.places()
        predicted = wide(self.decoder(self.backbone(images, visible=visible)[-1], visible, hidden))
        if self.norm_pix:
            predicted = unnormalized(predicted, taken(patches_of(wide(images), self.backbone.patch_size), hidden))
        return with_patches(images, predicted, hidden, self.backbone.patch_size)
