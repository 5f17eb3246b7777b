"""SimCLR: find the other view of an image among all views of a batch.

Chen et al. 2020 (arXiv 2002.05709), algorithm 1; the loss is NT-Xent, eq. 1 there. Both views of all images go
through the network in one call and share BatchNorm statistics, as in the paper's code.

Negatives are the rows of all ranks, and the gradient is that of one process with the whole batch. (MMSelfSup's is
divided by the number of ranks once too often. LARS compensates for that, except in the parameters that it does not
scale.)
"""

import torch
from torch import Tensor

from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.nn.feature_std import feature_std
from sslrun.nn.heads import ContrastiveHead
from sslrun.nn.necks import Neck


class SimCLR(Method):
    """Contrastive learning: finds the other view of an image among all views of the batch (arXiv 2002.05709).

    It takes two views of each image, in one view group or two.

    Args:
        backbone: the encoder to train.
        neck: projector on top of the backbone.
        head: contrastive loss between the views.
    """

    num_views = 2
    compares_samples = True

    def __init__(self, backbone: Backbone, neck: Neck, head: ContrastiveHead) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head

    def embed(self, batch: Batch, progress: Progress) -> list[Tensor]:
        images = batch.views[0] if len(batch.views) == 1 else torch.cat(batch.views)
        if len(images) != 2 * len(batch.index):
            raise ValueError(f"SimCLR compares 2 views of each image, not {len(images) // len(batch.index)}")
        embeddings: Tensor = self.neck(self.backbone(images)[-1])
        return list(embeddings.chunk(2))

    def compare(self, embedded: list[Tensor], progress: Progress) -> Loss:
        embeddings = torch.cat(embedded)
        return Loss(self.head.between_views(embeddings), {"feature_std": feature_std(embeddings)})
