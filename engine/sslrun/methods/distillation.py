"""Distillation: a network learns the features of a frozen teacher, whatever the architecture of either.

The losses are those of lightly-train's distillation, versions 1 to 3; similarities to a queue are SEED's (Fang et al.
2021, arXiv 2101.04731). Teacher and student see the same images, which may be mixed (mixup: Zhang et al. 2018, arXiv
1710.09412) with one share for the whole batch, uniform from 0 to 1. With y the teacher's feature and x the student's,
projected by a linear layer, both of unit length:

- similarities: KL(softmax(Q y / tau) || softmax(Q x / tau)), mean over samples; Q are the teacher's features of this
  global batch and of the images before it.
- tokens: for each patch of an image, KL between the softmax of the teacher's similarities to all patches of that image
  and that of the student's, divided by tau; mean over patches and samples. No projection.
- features: mean squared error between the teacher's map and the student's, projected.

Maps of the student are resized bilinearly to the grid of the teacher's. Deviations: Q has queue_len features besides
those of the batch, which replace the oldest first there, and it is the same on all ranks; adjacent images of the global
batch are mixed, so the result does not depend on the number of ranks or on accumulation; the teacher's map is that of
its last block alone, not of the last two; similarities of patches are cosines.

The teacher is in evaluation mode and gets no gradient. A new run reads its weights from `teacher_weights`; checkpoints
contain them, so that a resumed run does not need the file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels import soft_cross_entropy
from sslrun.config.paths import FilePath
from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.errors import UsageError
from sslrun.nn.argument_checks import require_not_negative, require_positive, require_temperature
from sslrun.nn.feature_std import feature_std
from sslrun.nn.heads import Head
from sslrun.nn.necks import pooled
from sslrun.nn.precision import wide
from sslrun.nn.queue_and_bank import Queue
from sslrun.randomness import step_rng
from sslrun.runtime.distributed import all_gather_rows
from sslrun.scheduled import Number, at


class Frozen(nn.Module):
    """A network that is always in evaluation mode and gets no gradient; called as the network itself."""

    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.network(images)


class DistillationHead(Head):
    """The losses between a student's outputs and a frozen teacher's, each with its weight.

    Args:
        in_channels: number of features of the student.
        feat_dim: number of features D of the teacher.
        queue_len: number of the teacher's features of earlier images that similarities are computed with.
        temperature: divisor of all similarities.
        similarities: weight of the divergence between similarities to the queue. All weights may have a schedule.
        tokens: weight of the divergence between the similarities of an image's patches to each other. It and `features`
            need networks that return a map, such as a ResNet, or a VisionTransformer with patch_tokens = true.
        features: weight of the squared error of the map.
    """

    def __init__(
        self,
        in_channels: int,
        feat_dim: int,
        queue_len: int = 8192,
        temperature: float = 0.07,
        similarities: Number = 1.0,
        tokens: Number = 0.0,
        features: Number = 0.0,
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, feat_dim=feat_dim)
        require_temperature(temperature=temperature)
        require_not_negative(similarities=similarities, tokens=tokens, features=features)
        self.feat_dim, self.temperature = feat_dim, temperature
        self.similarities, self.tokens, self.features = similarities, tokens, features
        if not any((similarities, tokens, features)):
            raise ValueError("similarities, tokens and features are 0: there is nothing to learn")
        self.projection = _linear(in_channels, feat_dim) if similarities else None
        self.map_projection = _linear(in_channels, feat_dim) if features else None
        self.queue = Queue(queue_len, feat_dim) if similarities else None

    @property
    def needs_maps(self) -> bool:
        return bool(self.tokens or self.features)

    def forward(
        self, student: list[Tensor], feature: Tensor, patches: Tensor | None, keys: Tensor, progress: Progress
    ) -> Tensor:
        """The weighted sum of the losses, 0-d, float32 (float64 for float64 outputs).

        Args:
            student: what the student's backbone returns.
            feature: (B, D), of unit length, the teacher's.
            patches: (B, D, h, w), the teacher's map; None if no loss needs it.
            keys: (K, D), of unit length, the teacher's features of the global batch.
            progress: position in the run.
        """
        parts: list[Tensor] = []
        if self.projection is not None and self.queue is not None:
            projected = F.normalize(wide(self.projection(pooled(student[-1]))), dim=1)
            with torch.autocast(feature.device.type, enabled=False):
                all_keys = torch.cat([self.queue.rows, keys]).T
                divergence = self._divergence(projected @ all_keys, feature @ all_keys)
            parts.append(at(self.similarities, progress) * divergence)
        if patches is not None:
            own = F.interpolate(wide(map_of(student)), patches.shape[-2:], mode="bilinear", align_corners=False)
            if self.tokens:
                with torch.autocast(feature.device.type, enabled=False):
                    divergence = self._divergence(*(_similarities_of_patches(part) for part in (own, patches)))
                parts.append(at(self.tokens, progress) * divergence)
            if self.map_projection is not None:
                projected = wide(self.map_projection(own.permute(0, 2, 3, 1)))
                parts.append(at(self.features, progress) * F.mse_loss(projected, patches.permute(0, 2, 3, 1)))
        return torch.stack(parts).sum()

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over rows of KL(softmax(teacher / tau) || softmax(student / tau)), for (N, K) similarities."""
        cross, own = (soft_cross_entropy(s, teacher, self.temperature, self.temperature) for s in (student, teacher))
        return cross - own


class Distillation(Method):
    """Distills a frozen teacher into any backbone: similarities to a queue of its features (arXiv 2101.04731), or
    features.

    It takes one view of each image, which teacher and student both see.

    Args:
        backbone: the student to train.
        teacher: the frozen network.
        head: the losses; its feat_dim is the teacher's number of features.
        teacher_weights: file with the teacher's weights, as for load_from: a run, a checkpoint, or what `sslrun
            import-weights` writes. Without it the teacher is a random network.
        mixup: whether adjacent images of a batch are mixed, with one share for all of them that is drawn at each step.
    """

    num_views = 1

    def __init__(
        self,
        backbone: Backbone,
        teacher: Backbone,
        head: DistillationHead,
        teacher_weights: FilePath | None = None,
        mixup: bool = True,
    ) -> None:
        super().__init__()
        if head.feat_dim != teacher.num_features:
            raise ValueError(f"feat_dim is {head.feat_dim}, expected the teacher's {teacher.num_features} features")
        self.backbone, self.teacher, self.head = backbone, Frozen(teacher), head
        self.teacher_weights, self.mixup = teacher_weights, mixup

    def frozen_weights(self) -> dict[str, str]:
        return {} if self.teacher_weights is None else {"teacher.network": self.teacher_weights}

    def targets(
        self, batches: list[Batch], progress: Progress
    ) -> list[tuple[float | None, Tensor, Tensor | None, Tensor]]:
        """Of each micro-batch: the share of mixup, the teacher's normalized feature (B, D) and its map, and the
        features of the global batch."""
        share = step_rng(progress.seed, progress.step).random() if self.mixup else None
        features: list[Tensor] = []
        maps: list[Tensor | None] = []
        for batch in batches:
            outputs = self.teacher(_mixed(batch.views[0], share))
            features.append(F.normalize(wide(pooled(outputs[-1])), dim=1))
            maps.append(wide(map_of(outputs)) if self.head.needs_maps else None)
        keys = all_gather_rows(torch.cat(features))
        return [(share, feature, patches, keys) for feature, patches in zip(features, maps, strict=True)]

    def forward(
        self, batch: Batch, progress: Progress, targets: tuple[float | None, Tensor, Tensor | None, Tensor]
    ) -> Loss:
        share, feature, patches, keys = targets
        outputs = self.backbone(_mixed(batch.views[0], share))
        loss = self.head(outputs, feature, patches, keys, progress)
        return Loss(loss, {"feature_std": feature_std(pooled(outputs[-1]))}, {"features": feature})

    def after_step(self, progress: Progress, carry: dict[str, Tensor]) -> None:
        if self.head.queue is not None:
            self.head.queue.push(carry["features"])


def map_of(outputs: list[Tensor]) -> Tensor:
    """The last map (B, C, H, W) among a backbone's outputs. Raises UsageError: there is none."""
    for output in reversed(outputs):
        if output.dim() == 4:
            return output
    raise UsageError(
        "tokens and features of the head need a map of both networks: patch_tokens = true in a transformer"
    )


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def _similarities_of_patches(maps: Tensor) -> Tensor:
    """(B h w, h w): cosine similarities of the patches of each image, from (B, C, h, w)."""
    unit = F.normalize(maps.flatten(2), dim=1)
    return (unit.transpose(1, 2) @ unit).flatten(0, 1)


def _mixed(images: Tensor, share: float | None) -> Tensor:
    """Rows 2i and 2i + 1 of images (B, 3, H, W), each with the other in place of 1 - share of it."""
    if share is None:
        return images
    if len(images) % 2:
        raise ValueError(f"{len(images)} samples at once: images are mixed in pairs, so the number has to be even")
    images = wide(images)  # a mixture of bfloat16 images would be rounded once more
    other = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return images * share + other * (1 - share)
