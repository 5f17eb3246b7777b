"""NPID, non-parametric instance discrimination: tell each image from the others in a memory bank of all embeddings.

Wu, Xiong, Yu & Lin 2018 (arXiv 1805.01978). A bank holds one embedding for each image of the training set (section
3.1). The loss is that of MMSelfSup and of He et al. 2020 (arXiv 1911.05722, eq. 1): a softmax over an image's own row
and `neg_num` rows drawn from the bank. After each step the rows of the batch are updated with momentum.

Deviations from the paper, shared with MMSelfSup: softmax over the drawn rows instead of noise-contrastive estimation
with its constant Z (eq. 4 to 8), and no proximal term (eq. 10). Deviations from MMSelfSup: negatives are a function of
(seed, step, position in the global batch), so they do not depend on the number of ranks or on accumulation; if an image
occurs twice in a global batch, its row is updated with the later embedding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels import bank_nce
from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.nn.argument_checks import require_fraction, require_positive
from sslrun.nn.drawn_rows import keys_of, uniform_indices
from sslrun.nn.feature_std import feature_std
from sslrun.nn.heads import ContrastiveHead
from sslrun.nn.necks import Neck
from sslrun.nn.queue_and_bank import Bank
from sslrun.randomness import fixed_generator


class NPID(Method):
    """Instance discrimination: recognizes each image among all in a memory bank of embeddings (arXiv 1805.01978).

    It takes one view of each image.

    Args:
        backbone: the encoder to train.
        neck: projector on top of the backbone.
        head: contrastive loss, which has the temperature of the softmax.
        neg_num: number K of negatives drawn from the bank for each image, with replacement.
        feat_dim: dimension D of the embeddings; must equal the neck's out_channels.
        momentum: weight of a new embedding in its row of the bank, 0 to 1; 1 replaces the row.
        ensure_neg: whether the image's own row is never drawn as a negative.
    """

    num_views = 1
    remembers_samples = True

    bank: Bank

    def __init__(
        self,
        backbone: Backbone,
        neck: Neck,
        head: ContrastiveHead,
        neg_num: int = 65536,
        feat_dim: int = 128,
        momentum: float = 0.5,
        ensure_neg: bool = False,
    ) -> None:
        super().__init__()
        neck.require_out_channels(feat_dim)
        require_positive(neg_num=neg_num)
        require_fraction(momentum=momentum)
        self.backbone, self.neck, self.head = backbone, neck, head
        self.neg_num, self.feat_dim, self.momentum, self.ensure_neg = neg_num, feat_dim, momentum, ensure_neg
        self.bank_seed = int(torch.randint(2**62, ()))  # drawn here, where the run's seed has just been set

    def prepare(self, num_samples: int) -> None:
        """Creates the bank, (N, D) float32: 656 MB for ImageNet."""
        generator = fixed_generator(self.bank_seed)
        self.bank = Bank(num_samples, self.feat_dim, self.momentum, generator)

    def targets(self, batches: list[Batch], progress: Progress) -> list[Tensor]:
        """The keys (B,) from which each micro-batch's negatives are drawn."""
        return keys_of(batches, progress.generator())

    def forward(self, batch: Batch, progress: Progress, targets: Tensor) -> Loss:
        queries = self.neck(self.backbone(batch.crops()[0])[-1])
        others = uniform_indices(targets, self.neg_num, len(self.bank.rows), batch.index if self.ensure_neg else None)
        loss, top1 = bank_nce(queries, self.bank.rows, batch.index, others, self.head.temperature)
        embeddings = F.normalize(queries.detach().to(self.bank.rows.dtype), dim=1)
        return Loss(
            loss,
            {"top1_pct": 100 * top1, "feature_std": feature_std(embeddings)},
            {"index": batch.index, "embeddings": embeddings},
        )

    def after_step(self, progress: Progress, carry: dict[str, Tensor]) -> None:
        self.bank.update(carry["index"], carry["embeddings"])

    def chance_loss(self) -> float:
        return math.log(self.neg_num + 1)
