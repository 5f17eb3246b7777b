"""SwAV: predict from one crop of an image the prototypes to which another crop was assigned.

Caron et al. 2020 (arXiv 2006.09882). The scores of a crop are the dot products of its normalized embedding with K
normalized prototypes. Each crop in `crops_for_assign` (the two large ones) gets a target q from Sinkhorn's iteration
over the scores of the global batch (eq. 3 to 5), and every other crop of the image predicts it (eq. 2 and 6,
multi-crop: eq. 7): the loss is the mean over those crops of the cross-entropy of q and softmax(scores / T).

A queue of earlier embeddings takes part in Sinkhorn's iteration once it is full (section 4.1, "working with small
batches"). Targets are stored only as a center of the scores (`sslkernels.sinkhorn_center`).

Assignments are computed over the global batch, together with the queue. The backbone runs once for each group of views,
the neck once for all crops, so the neck's BatchNorm normalizes all crops together, as in the authors' code.

Deviations: Sinkhorn's column sums cover all ranks, as in the paper; in MMSelfSup each rank has its own. Prototypes are
normalized after each step instead of before each forward pass, which gives the same sequence of weights. The queue may
have any length (the authors shorten it to a multiple of the batch). Scores are float32 under autocast too.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels import sinkhorn_center, soft_cross_entropy
from sslrun.contract import Backbone, Batch, Loss, Method, Progress, Rewrite
from sslrun.nn.argument_checks import require_not_negative, require_temperature
from sslrun.nn.feature_std import feature_std
from sslrun.nn.heads import Head
from sslrun.nn.necks import Neck, pooled
from sslrun.nn.queue_and_bank import Queue
from sslrun.runtime import distributed


class Prototypes(nn.Linear):
    """K normalized directions; `forward` gives the scores of embeddings (..., D), (..., K)."""

    weight: nn.Parameter

    def __init__(self, dim: int, num_prototypes: int) -> None:
        super().__init__(dim, num_prototypes, bias=False)
        with torch.no_grad():
            self.weight.copy_(unit_rows(self.weight))

    def forward(self, embeddings: Tensor, is_frozen: bool = False) -> Tensor:
        """The scores; the prototypes get no gradient if `is_frozen`."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(embeddings, self.weight.detach() if is_frozen else self.weight)


class SwAVHead(Head):
    """Prototypes, and the cross-entropy between some crops' assignments and the other crops' predictions.

    Caron et al. 2020, arXiv 2006.09882, eq. 2 to 7. Assignments come from Sinkhorn's iteration over all ranks' samples.

    Args:
        feat_dim: dimension D of the embeddings.
        num_prototypes: number K of prototypes.
        temperature: temperature T of the predictions.
        epsilon: temperature of the assignments; the lower, the more each crop is assigned to a single prototype.
        sinkhorn_iterations: number of Sinkhorn iterations; each normalizes columns, then rows.
        crops_for_assign: indices of the crops that get an assignment, counted from 0 through all view groups.
    """

    def __init__(
        self,
        feat_dim: int = 128,
        num_prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        crops_for_assign: Sequence[int] = (0, 1),
    ) -> None:
        super().__init__()
        require_temperature(temperature=temperature, epsilon=epsilon)
        if num_prototypes < 2 or sinkhorn_iterations < 1:
            raise ValueError(
                f"num_prototypes is {num_prototypes} and sinkhorn_iterations {sinkhorn_iterations}, "
                "expected at least 2 and 1"
            )
        if not crops_for_assign or min(crops_for_assign) < 0 or len(set(crops_for_assign)) < len(crops_for_assign):
            raise ValueError(f"crops_for_assign is {list(crops_for_assign)}, expected different numbers of crops")
        self.prototypes = Prototypes(feat_dim, num_prototypes)
        self.feat_dim, self.temperature, self.epsilon = feat_dim, temperature, epsilon
        self.sinkhorn_iterations, self.crops_for_assign = sinkhorn_iterations, list(crops_for_assign)

    def forward(self, crops: Tensor, is_frozen: bool, stored: Tensor | None = None) -> Tensor:
        """The loss: mean over assigned crops, other crops and samples.

        Args:
            crops: (V, B, D), normalized embeddings of all crops of this rank's samples.
            is_frozen: whether the prototypes get no gradient.
            stored: (L, A, D), normalized embeddings of the A assigned crops of earlier samples, this rank's share of
                the queue. Rows of zeros are ignored.

        Returns:
            0-d, float32 (float64 for float64 crops).
        """
        if len(crops) <= max(1, *self.crops_for_assign):
            raise ValueError(
                f"data.views give {len(crops)} crop(s), expected two or more, and all of crops_for_assign, "
                f"{self.crops_for_assign}"
            )
        scores = self.prototypes(crops, is_frozen).unbind()
        losses = []
        for place, assigned in enumerate(self.crops_for_assign):
            teacher = scores[assigned].detach()
            center = self._center(teacher, None if stored is None else stored[:, place])
            losses += [
                soft_cross_entropy(student, teacher, self.temperature, self.epsilon, center)
                for crop, student in enumerate(scores)
                if crop != assigned
            ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _center(self, scores: Tensor, stored: Tensor | None) -> Tensor:
        """(K,): softmax((scores - center) / epsilon) are the assignments."""
        if stored is not None:
            is_none = ~stored.any(dim=1, keepdim=True)
            scores = torch.cat([self.prototypes(stored).masked_fill(is_none, -math.inf), scores])
        return sinkhorn_center(scores, self.epsilon, self.sinkhorn_iterations, group=distributed.group())


class SwAV(Method):
    """Predicts from one crop the prototypes to which another crop was assigned; multi-crop (arXiv 2006.09882).

    Args:
        backbone: the encoder to train.
        neck: projector on top of the backbone.
        head: prototypes and loss; its feat_dim must equal the neck's out_channels.
        queue_length: number of earlier samples whose embeddings take part in the assignments; 0 for no queue.
        epoch_queue_starts: first epoch, counted from 0, whose embeddings are kept; the queue is used once it is full.
        freeze_prototypes_iters: optimizer steps at the start of the run during which the prototypes get no gradient. A
            paramwise rule with freeze_iters keeps weight decay from them in these steps.
    """

    compares_samples = True
    uncompiled = ("head",)  # collectives, and a flag that changes once; its operations are kernels already

    queue: Queue | None

    def __init__(
        self,
        backbone: Backbone,
        neck: Neck,
        head: SwAVHead,
        queue_length: int = 0,
        epoch_queue_starts: int = 15,
        freeze_prototypes_iters: int = 0,
    ) -> None:
        super().__init__()
        neck.require_out_channels(head.feat_dim)
        require_not_negative(
            queue_length=queue_length,
            epoch_queue_starts=epoch_queue_starts,
            freeze_prototypes_iters=freeze_prototypes_iters,
        )
        self.backbone, self.neck, self.head = backbone, neck, head
        self.epoch_queue_starts, self.freeze_prototypes_iters = epoch_queue_starts, freeze_prototypes_iters
        # A row holds the embeddings of all assigned crops of an image.
        dim = len(head.crops_for_assign) * head.feat_dim
        self.queue = Queue(queue_length, dim, starts_empty=True) if queue_length else None

    def embed(self, batch: Batch, progress: Progress) -> list[Tensor]:
        features = torch.cat([pooled(self.backbone(views)[-1]) for views in batch.views])
        dtype = self.head.prototypes.weight.dtype  # float32, also under autocast
        return list(F.normalize(self.neck(features).to(dtype), dim=1).split(len(batch.index)))

    def compare(self, embedded: list[Tensor], progress: Progress) -> Loss:
        crops = torch.stack(embedded)
        loss = self.head(crops, progress.step < self.freeze_prototypes_iters, self._stored(progress))
        assigned = [crops[crop].detach() for crop in self.head.crops_for_assign]  # crops[list] would wait
        carry = {"embeddings": torch.cat(assigned, dim=1)} if self._keeps(progress) else {}
        return Loss(loss, {"feature_std": feature_std(assigned[0])}, carry)

    def rewrites(self, progress: Progress) -> list[Rewrite]:
        if progress.step <= self.freeze_prototypes_iters:  # step - 1, which was applied, did not change them
            return []
        return [(self.head.prototypes.weight, unit_rows)]

    def after_step(self, progress: Progress, carry: dict[str, Tensor]) -> None:
        if self.queue is not None and carry:
            self.queue.push(carry["embeddings"])

    def chance_loss(self) -> float:
        return math.log(self.head.prototypes.out_features)

    def _keeps(self, progress: Progress) -> bool:
        return self.queue is not None and progress.epoch >= self.epoch_queue_starts

    def _stored(self, progress: Progress) -> Tensor | None:
        """(L, A, D), this rank's share of the queue; zeros until the queue is full."""
        if self.queue is None or not self._keeps(progress):
            return None
        share = self.queue.rows[distributed.rank() :: distributed.world_size()] * self.queue.is_full()
        return share.unflatten(1, (-1, self.head.feat_dim))


def unit_rows(weight: Tensor) -> Tensor:
    """(K, D) with every row at length 1."""
    return F.normalize(weight, dim=1)
