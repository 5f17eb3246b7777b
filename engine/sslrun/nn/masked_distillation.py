"""What iBOT, DINOv2 and DINOv3 share: self-distillation of class tokens and of masked patches.

The student sees the large crops with some patches masked, and all small crops; the teacher sees the large crops whole.
The class term is DINO's. The patch term is, for each large crop, the mean over its masked patches of the cross-entropy
between the teacher's and the student's distribution of the same patch; then the mean over all large crops, in which one
without masked patches counts as 0 (Zhou et al. 2022, arXiv 2111.07832, eq. 2 and 3, and the authors' code).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sslrun.contract import Backbone, Batch, Loss, Method, PatchMask, Pooled, Progress
from sslrun.errors import UsageError
from sslrun.nn.argument_checks import require_fraction, require_not_negative, require_positive
from sslrun.nn.feature_std import feature_std
from sslrun.nn.koleo import koleo
from sslrun.nn.momentum import teacher_of
from sslrun.nn.necks import Neck
from sslrun.nn.norm import group_norms
from sslrun.nn.self_distillation import DINOHead, Prototypes, embedded, outputs_of_sizes, passes
from sslrun.nn.vit import VisionTransformer
from sslrun.scheduled import Number, Scheduled, at

MOMENTUM = Scheduled(schedule="cosine", start=0.992, end=1.0)
"""EMA decay of the teacher in DINOv2 and DINOv3."""


class Targets(NamedTuple):
    """What the teacher gives a micro-batch of B samples, whose G large crops have P masked patches.

    Attributes:
        classes: (G, B, D), embeddings of the class tokens, normalized.
        patches: (P, D'), embeddings of the masked patches, normalized.
        class_center: (K,), subtracted from the scores of the class tokens.
        patch_center: (K',), subtracted from those of the patches.
        anchored: (G x B, T, C), an earlier teacher's outputs of all patches of the large crops (DINOv3).
    """

    classes: Tensor
    patches: Tensor
    class_center: Tensor
    patch_center: Tensor
    anchored: Tensor | None = None


class MaskedDistillation(Method, listed=False):
    """Self-distillation of class tokens and masked patches. Arguments: see `DINOv3`; KoLeo needs a `koleo_group`."""

    uncompiled = ("head", "patch_head")  # as in DINO

    patch_center: Tensor
    patch_neck: Neck | None
    patch_head: DINOHead | None
    teacher_patch_neck: Neck | None
    teacher_patch_prototypes: Prototypes | None

    def __init__(
        self,
        backbone: VisionTransformer,
        neck: Neck,
        head: DINOHead,
        patch_neck: Neck | None,
        patch_head: DINOHead | None,
        momentum: Number,
        large_crops: int,
        class_weight: Number,
        patch_weight: Number,
        koleo_group: int | None = None,
        koleo_weight: Number = 0.0,
        small_weight: Number = 1.0,
    ) -> None:
        super().__init__()
        neck.require_out_channels(head.feat_dim)
        (patch_neck or neck).require_out_channels((patch_head or head).feat_dim)
        require_fraction(momentum=momentum)
        require_positive(large_crops=large_crops)
        require_not_negative(class_weight=class_weight, patch_weight=patch_weight)
        require_not_negative(koleo_weight=koleo_weight, small_weight=small_weight)
        if koleo_group is not None and koleo_group < 2:
            raise ValueError(f"koleo_group is {koleo_group}, expected 2 or more samples")
        if not backbone.patch_tokens or backbone.mask_token is None:
            raise ValueError("the backbone must have mask_token = true and patch_tokens = true")
        if group_norms(patch_neck or neck):
            raise ValueError("the neck of patches cannot have batch normalization: a crop has any number of them")
        self.backbone: VisionTransformer = backbone
        self.neck, self.head, self.patch_neck, self.patch_head = neck, head, patch_neck, patch_head
        self.teacher_backbone, self.teacher_neck = teacher_of(backbone), teacher_of(neck)
        self.teacher_prototypes = teacher_of(head.prototypes)
        self.teacher_patch_neck = None if patch_neck is None else teacher_of(patch_neck)
        self.teacher_patch_prototypes = None if patch_head is None else teacher_of(patch_head.prototypes)
        self.register_buffer("patch_center", torch.zeros((patch_head or head).num_prototypes))
        self.momentum, self.large_crops = momentum, large_crops
        self.class_weight, self.patch_weight, self.small_weight = class_weight, patch_weight, small_weight
        self.koleo_group, self.koleo_weight = koleo_group, koleo_weight

    def targets(self, batches: list[Batch], progress: Progress) -> list[Targets]:
        classes, patches = [], []
        for batch in batches:
            places = masked_places(mask_of(batch, self.large_crops))
            tokens, features = self._large(self.teacher_backbone, batch, None)
            classes.append(embedded(self.teacher_neck, features).unflatten(0, (self.large_crops, -1)))
            masked = tokens.flatten(0, 1).index_select(0, places)
            patches.append(embedded(self.teacher_patch_neck or self.teacher_neck, masked))
        head, average = self.patch_head or self.head, self.patch_center
        class_center = self.head.center_of(classes, self.teacher_prototypes(), progress, self.head.center)
        patch_center = head.center_of(patches, self._teacher_patch_prototypes(), progress, average)
        return [Targets(*each, class_center, patch_center) for each in zip(classes, patches, strict=True)]

    def forward(self, batch: Batch, progress: Progress, targets: Targets) -> Loss:
        return self.losses(batch, progress, targets)[0]

    def losses(self, batch: Batch, progress: Progress, targets: Targets) -> tuple[Loss, Tensor]:
        """The loss, and the student's outputs of the patches of the G large crops, (G x B, T, C)."""
        large, samples = self.large_crops, len(batch.index)
        small = batch.crops()[large:]
        if large + len(small) < 2:
            raise ValueError("data.views give 1 crop, expected two or more")
        mask = mask_of(batch, large)
        places = masked_places(mask)
        tokens, features, *others = self._large(self.backbone, batch, mask, passes(small))
        crops = embedded(self.neck, torch.cat([features, *others])).unflatten(0, (-1, samples))
        patches = embedded(self.patch_neck or self.neck, tokens.flatten(0, 1).index_select(0, places))

        scores = self.head.scores(targets.classes, self.teacher_prototypes())
        class_loss = self.head(crops, scores, targets.class_center, progress, at(self.small_weight, progress))
        signs = self.head.signs(scores, targets.class_center)

        head = self.patch_head or self.head
        crop, per_crop = places // mask.hidden.shape[1], mask.hidden.sum(dim=1)
        shares = 1 / (per_crop[crop] * len(mask.hidden)).to(patches.dtype)
        scores = head.scores(targets.patches, self._teacher_patch_prototypes())
        patch_loss = head.of_patches(patches, scores, shares, targets.patch_center, progress)

        value = at(self.class_weight, progress) * class_loss + at(self.patch_weight, progress) * patch_loss
        sums = torch.stack([patch_loss.detach() * len(per_crop) / head.chance_loss, (per_crop > 0).sum()])
        metrics: dict[str, Tensor | Pooled] = {
            "feature_std": feature_std(crops[0]),
            "class_loss_of_chance": class_loss.detach() / self.head.chance_loss,
            "patch_loss_of_chance": Pooled(sums, _ratio),
        }
        carry = {"classes": targets.classes.transpose(0, 1).flatten(1)}
        carry |= _sums_of_samples(targets.patches, places, mask.hidden, samples)
        if self.koleo_group is not None:
            spread = torch.stack([koleo(crop, self.koleo_group) for crop in features.split(samples)]).sum()
            value = value + at(self.koleo_weight, progress) * spread
            metrics["koleo_loss"] = spread.detach()
        return Loss(value, metrics | signs, carry), tokens

    def teachers(self, progress: Progress) -> list[tuple[nn.Module, nn.Module, float]]:
        momentum = at(self.momentum, progress)
        pairs: list[tuple[nn.Module | None, nn.Module | None]] = [
            (self.teacher_backbone, self.backbone),
            (self.teacher_neck, self.neck),
            (self.teacher_prototypes, self.head.prototypes),
            (self.teacher_patch_neck, self.patch_neck),
            (self.teacher_patch_prototypes, None if self.patch_head is None else self.patch_head.prototypes),
        ]
        return [(a, b, momentum) for a, b in pairs if a is not None and b is not None]

    def after_step(self, progress: Progress, carry: dict[str, Tensor]) -> None:
        classes = carry["classes"].unflatten(1, (self.large_crops, -1)).flatten(0, 1)
        total, count = classes.sum(dim=0), classes.new_full((), len(classes))
        self.head.follow(self.head.center, total, count, self.teacher_prototypes(), progress)
        total, count = carry["patches"].sum(dim=0), carry["masked"].sum()
        head = self.patch_head or self.head
        head.follow(self.patch_center, total, count, self._teacher_patch_prototypes(), progress)

    def _images(self, batch: Batch) -> Tensor:
        """The large crops, (G x B, 3, H, W)."""
        crops = batch.crops()[: self.large_crops]
        return crops[0] if len(crops) == 1 else torch.cat(crops)

    def _teacher_patch_prototypes(self) -> Tensor:
        return (self.teacher_patch_prototypes or self.teacher_prototypes)()

    def _large(
        self, backbone: Backbone, batch: Batch, mask: PatchMask | None, small: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Outputs of the large crops' patches, (G x B, T, C), and of their class tokens, (G x B, C); then the features
        of small crops, one tensor for each size."""
        masked: dict[str, Tensor] = {} if mask is None else {"mask": mask.hidden}
        maps, *features = outputs_of_sizes(backbone, [self._images(batch), *small], **masked)
        if mask is not None and mask.hidden.shape[1] != maps[0, 0].numel():
            found, expected = mask.hidden.shape[1], maps[0, 0].numel()
            raise UsageError(f"a mask has {found} patches, but the network {expected}: patch_size of the mask")
        return [maps.flatten(2).transpose(1, 2), *features]


def mask_of(batch: Batch, large_crops: int) -> PatchMask:
    """The mask of the large crops, which are the first ones.

    Raises:
        UsageError: one of them has none, or another crop has one, or they hide nothing.
    """
    counts = [len(views) // len(batch.index) for views in batch.views]
    masks = [mask for mask in batch.masks if mask is not None]
    is_masked = [mask is not None for mask in batch.masks] or [False] * len(counts)
    large = [count for count, masked in zip(counts, is_masked, strict=True) if masked]
    if sum(large) != large_crops or not all(is_masked[: len(large)]):
        raise UsageError(f"the first {large_crops} crops of data.views (large_crops) need a mask, and no others")
    hidden = sum(mask.num_hidden for mask in masks)
    if not hidden:
        raise UsageError(
            f"the masks of {len(batch.index)} samples hide no patch; a BlockMask shares them out over `samples`, which "
            "should be data.samples_per_gpu or less"
        )
    return masks[0] if len(masks) == 1 else PatchMask(torch.cat([mask.hidden for mask in masks]), hidden)


def masked_places(mask: PatchMask) -> Tensor:
    """(P,) int64, the masked patches of all views, counted through, in their order."""
    flat = mask.hidden.flatten().to(torch.uint8)
    return flat.argsort(descending=True, stable=True)[: mask.num_hidden]


def _sums_of_samples(patches: Tensor, places: Tensor, hidden: Tensor, samples: int) -> dict[str, Tensor]:
    """For the mean over the masked patches of the global batch: their sum in each sample, (B, D), and their number,
    (B, 1)."""
    views, per_view = hidden.shape
    whole = patches.new_zeros(views * per_view, patches.shape[1]).index_copy_(0, places, patches)
    sums = whole.view(-1, samples, per_view, patches.shape[1]).sum(dim=(0, 2))
    masked = hidden.view(-1, samples, per_view).sum(dim=(0, 2))
    return {"patches": sums, "masked": masked.unsqueeze(1)}


def _ratio(sums: Tensor) -> Tensor:
    return sums[0] / sums[1]
