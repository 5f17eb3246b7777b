"""MaskFeat: one linear layer predicts histograms of oriented gradients of the hidden patches.

Wei, Fan, Xie, Wu, Yuille, Feichtenhofer 2021 (arXiv 2112.09133), the form for images; where the paper is silent, the
code of MMSelfSup. All patches go through the network, the hidden ones as a learned mask token. The target of a patch
is the histograms of all its cells and channels (`sslrun.nn.hog`), in the order channel, direction, row, column; the
loss is the mean squared error over the hidden patches.

Deviation: where images reach the step as bfloat16 (CUDA in mixed precision), gradients are those of their 8 bits.
"""

import torch
from torch import Tensor, nn

from sslrun.contract import Batch, Loss, Method, Progress
from sslrun.errors import UsageError
from sslrun.nn.argument_checks import require_positive
from sslrun.nn.decoders import HiddenPatchHead
from sslrun.nn.hog import oriented_gradients
from sslrun.nn.precision import wide
from sslrun.nn.vit import VisionTransformer, taken


class MaskFeat(Method):
    """Predicts histograms of oriented gradients (HOG) of hidden patches by one linear layer (arXiv 2112.09133).

    It takes one view of each image, with a mask (`mask` in `data.views`) that hides the same number of patches of each.

    Args:
        backbone: the encoder to train, with mask_token and patch_tokens.
        cell: height and width in pixels of the cells, each of which has a histogram for each channel; divides the
            patch size.
        bins: number of directions of a histogram, over half a turn.
        window: height and width in pixels of the Gaussian that weights the gradients and is repeated over the image;
            must divide the size of the views.
    """

    num_views = 1
    needs_masks = True
    is_measured_by_knn = False

    def __init__(self, backbone: VisionTransformer, cell: int = 8, bins: int = 9, window: int = 16) -> None:
        super().__init__()
        require_positive(cell=cell, bins=bins)
        if window < 2:
            raise ValueError(f"window is {window}, expected 2 or more")
        if backbone.patch_size % cell:
            raise ValueError(f"cell is {cell}, which does not divide the backbone's patch_size {backbone.patch_size}")
        self.backbone: VisionTransformer = backbone
        self.cell, self.bins, self.window = cell, bins, window
        numbers = (backbone.patch_size // cell) ** 2 * backbone.patch_embed.proj.in_channels * bins
        self.head = HiddenPatchHead(backbone, numbers)
        assert backbone.mask_token is not None
        nn.init.trunc_normal_(backbone.mask_token, std=0.02)

    def forward(self, batch: Batch, progress: Progress, targets: None) -> Loss:
        (images,), (mask,) = batch.views, batch.masks
        assert mask is not None
        predicted, hidden = self.head.of_hidden(self.backbone, images, mask)
        with torch.autocast(images.device.type, enabled=False):
            target = taken(self.histograms(wide(images)), hidden)
            return Loss((wide(predicted) - target).square().mean())

    def histograms(self, images: Tensor) -> Tensor:
        """(B, T, C bins cells): the target of each patch, row by row.

        Args:
            images: (B, C, H, W).

        Raises:
            UsageError: the images do not consist of whole windows.
        """
        height, width = images.shape[-2:]
        if height % self.window or width % self.window:
            raise UsageError(f"images of {height} x {width} px do not consist of windows of {self.window} px (window)")
        along = self.backbone.patch_size // self.cell  # cells along a side of a patch
        histograms = oriented_gradients(images, self.cell, self.bins, self.window).flatten(1, 2)
        parts = histograms.unflatten(3, (-1, along)).unflatten(2, (-1, along))  # (B, C bins, rows, a, columns, a)
        return parts.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)
