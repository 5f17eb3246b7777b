"""Classification of images by their labels: for fine-tuning, and as a baseline for methods without labels.

Cross-entropy, optionally with label smoothing (Szegedy et al. 2016, arXiv 1512.00567), mixup (Zhang et al. 2018, arXiv
1710.09412), CutMix (Yun et al. 2019, arXiv 1905.04899) and stochastic depth (Huang et al. 2016, arXiv 1603.09382) with
rates that rise linearly from the first branch to the last.

Deviation: mixup and CutMix mix adjacent samples of the global batch (the first with the second, the third with the
fourth, ...), with a separate share for each pair, and every random number is a function of seed, step and position in
the global batch. So the result does not depend on the number of ranks or on accumulation.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.nn.argument_checks import require_not_negative, require_rate
from sslrun.nn.dropout import dropout_masks
from sslrun.nn.heads import ClsHead
from sslrun.nn.necks import pooled
from sslrun.randomness import step_rng
from sslrun.runtime import distributed


class Mixing(NamedTuple):
    """How the pairs of a micro-batch of B samples are mixed; each entry is (B / 2,).

    Attributes:
        share: weight of a sample in its own mixture; the other sample has 1 - share.
        row: middle of CutMix's box as a fraction of the height.
        column: middle of CutMix's box as a fraction of the width.
        is_cut: whether the pair is mixed by CutMix.
    """

    share: Tensor
    row: Tensor
    column: Tensor
    is_cut: Tensor


class Supervised(Method):
    """Classifies images by their labels, for fine-tuning and as a baseline.

    Label smoothing (arXiv 1512.00567), mixup (arXiv 1710.09412), CutMix (arXiv 1905.04899) and stochastic depth (arXiv
    1603.09382) are optional.

    Label smoothing is that of arXiv 1512.00567, mixup of arXiv 1710.09412, CutMix of arXiv 1905.04899 and stochastic
    depth of arXiv 1603.09382.

    Args:
        backbone: the encoder to train. All of it is trained, even parts that its arguments freeze.
        num_classes: number of classes K.
        init_std: standard deviation of the classifier's initial weights.
        label_smoothing: share of the target that is spread evenly over all classes, 0 to below 1.
        mixup: alpha of the Beta distribution of mixup's shares; 0 for no mixup.
        cutmix: alpha of the Beta distribution of CutMix's shares; 0 for no CutMix. If mixup is set too, each pair of
            images gets one of the two.
        drop_path: probability that stochastic depth drops the last residual branch, for each sample; it rises linearly
            from 0 at the first branch.
    """

    num_views = 1

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        init_std: float = 0.01,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        require_rate(label_smoothing=label_smoothing, drop_path=drop_path)
        require_not_negative(mixup=mixup, cutmix=cutmix)
        self.backbone, self.classifier = backbone, ClsHead(backbone.num_features, num_classes, init_std)
        backbone.requires_grad_(True)
        self.num_classes = num_classes
        self.label_smoothing, self.mixup, self.cutmix = label_smoothing, mixup, cutmix
        branches = backbone.branches() if drop_path else []
        self.drop_rates = torch.linspace(0, drop_path, len(branches)).tolist()
        self._kept: Tensor | None = None  # (B, branches), within a forward pass of training
        for number, branch in enumerate(branches):
            branch.register_forward_hook(functools.partial(self._dropped, number))

    def targets(self, batches: list[Batch], progress: Progress) -> list[Any]:
        """(Mixing or None, mask of the branches or None) of each micro-batch."""
        samples, device = len(batches[0].index), batches[0].index.device
        mixing: list[Any] = [None] * len(batches)
        kept: list[Any] = [None] * len(batches)
        if self.mixup or self.cutmix:
            if samples % 2:
                raise ValueError(f"{samples} samples at once: images are mixed in pairs, so the number has to be even")
            mixing = self._mixing(len(batches), samples // 2, progress, device)
        if self.drop_rates:
            seed = progress.generator().initial_seed()
            kept = dropout_masks(len(batches), (samples, len(self.drop_rates)), self.drop_rates, seed, device)
        return list(zip(mixing, kept, strict=True))

    def forward(self, batch: Batch, progress: Progress, targets: tuple[Mixing | None, Tensor | None]) -> Loss:
        mixing, self._kept = targets
        images, labels = batch.views[0], batch.label
        assert labels is not None
        target = torch.zeros(len(labels), self.classifier.num_classes, device=labels.device).scatter_(
            1, labels.unsqueeze(1), 1.0
        )
        if mixing is not None:
            images, target = mixed(images, target, mixing)
        scores = self.classifier.fc(pooled(self.backbone(images)[-1]))
        self._kept = None
        loss = F.cross_entropy(scores.float(), target, label_smoothing=self.label_smoothing)
        return Loss(loss, {"top1_pct": 100 * (scores.argmax(dim=1) == labels).float().mean()})

    def predictor(self) -> nn.Module:
        return _Scores(self.backbone, self.classifier)

    def _mixing(self, count: int, pairs: int, progress: Progress, device: torch.device) -> list[Mixing]:
        """The mixing of this rank's micro-batches: its part of the numbers drawn for the global batch."""
        random = step_rng(progress.seed, progress.step)
        first, total = distributed.rank() * count * pairs, distributed.world_size() * count * pairs
        is_cut = random.random(total) < (self.cutmix > 0) * (0.5 if self.mixup > 0 else 1.0)
        shares = [random.beta(alpha, alpha, total) if alpha else np.ones(total) for alpha in (self.mixup, self.cutmix)]
        drawn = [np.where(is_cut, shares[1], shares[0]), random.random(total), random.random(total), is_cut]
        mine = [
            torch.from_numpy(numbers[first : first + count * pairs]).to(device, non_blocking=True) for numbers in drawn
        ]
        split = [(part if part.dtype == torch.bool else part.float()).view(count, pairs) for part in mine]
        return [Mixing(*parts) for parts in zip(*split, strict=True)]

    def _dropped(self, number: int, branch: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """A branch's output, scaled by 0 for dropped samples and by 1 / (1 - rate) for the others."""
        if self._kept is None:
            return output
        return output * self._kept[:, number].view(-1, *[1] * (output.dim() - 1)).to(output.dtype)


def mixed(images: Tensor, target: Tensor, mixing: Mixing) -> tuple[Tensor, Tensor]:
    """Mixes rows 2i and 2i + 1 of images (B, 3, H, W) and of targets (B, K).

    CutMix's box has 1 - share of the image's area. It is clipped at the image's edge, and the target follows the
    clipped area.
    """
    height, width = images.shape[2:]
    both = [part.repeat_interleave(2) for part in mixing]
    share, row, column = (part.view(-1, 1, 1, 1) for part in both[:3])
    half = (1 - share).sqrt() / 2
    inside = _within(row, half, height).unsqueeze(-1) & _within(column, half, width).unsqueeze(-2)  # (B, 1, H, W)
    kept = torch.where(both[3].view(-1, 1, 1, 1), (~inside).float(), share)
    weight = kept.mean(dim=(2, 3)).to(target.dtype)
    other_images, other_target = (part.unflatten(0, (-1, 2)).flip(1).flatten(0, 1) for part in (images, target))
    kept = kept.to(images.dtype)
    return images * kept + other_images * (1 - kept), target * weight + other_target * (1 - weight)


def _within(middle: Tensor, half: Tensor, pixels: int) -> Tensor:
    """(B, 1, pixels): whether a pixel's center is less than `half` (a fraction of the side) from `middle`."""
    places = (torch.arange(pixels, device=middle.device) + 0.5) / pixels
    return (places - middle.flatten(1).unsqueeze(2)).abs() < half.flatten(1).unsqueeze(2)


class _Scores(nn.Module):
    """Images to scores (B, K)."""

    def __init__(self, backbone: Backbone, classifier: ClsHead) -> None:
        super().__init__()
        self.backbone, self.classifier = backbone, classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.fc(pooled(self.backbone(images)[-1]))
