"""Linear classifiers with many settings, trained together on the same features.

H classifiers are one matrix of H x C rows, so that a batch costs one matrix product forward and one backward for any
number of settings. Each has its own learning rate, weight decay and, under LARS, trust ratios; a classifier that
diverges does not affect the others.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.optim import Optimizer
from sslrun.optim.lars import trust_ratios
from sslrun.optim.optimizers import LARS, SGD
from sslrun.randomness import fixed_generator
from sslrun.runtime import distributed

INITIAL_STD = 0.01  # standard deviation, as in MMSelfSup's and MAE's linear heads


class Setting(NamedTuple):
    """Learning rate and weight decay of one classifier of a grid."""

    lr: float
    weight_decay: float


class Scores(NamedTuple):
    """Losses and accuracies of H classifiers on some images.

    Attributes:
        loss: (H,) mean cross-entropy.
        top1_pct: (H,) percentage of images whose class has the largest logit.
        top5_pct: (H,) percentage of images whose class has one of the five largest logits.
        per_class_pct: (H, C) top-1 accuracy of each class in per cent; NaN for a class without images.
    """

    loss: Tensor
    top1_pct: Tensor
    top5_pct: Tensor
    per_class_pct: Tensor


class Heads:
    """H linear classifiers of D features into C classes. All start with the same weights, and with biases of 0.

    Biases do not decay: as in logistic regression they represent class frequencies, not complexity.

    Args:
        settings: settings of the H classifiers.
        rule: SGD or LARS, with the options that they share; its lr and weight_decay are not used. LARS has separate
            trust ratios for each classifier's weight and bias.
        num_features: number of features D.
        num_classes: number of classes C.
        seed: seed of the initial weights.
        device: where to compute.
    """

    def __init__(
        self,
        settings: Sequence[Setting],
        rule: Optimizer,
        num_features: int,
        num_classes: int,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        assert isinstance(rule, SGD | LARS)
        self.rule = rule
        heads = len(settings)
        generator = fixed_generator(seed)
        first = INITIAL_STD * torch.randn(1, num_classes, num_features, generator=generator)
        self.weight = first.to(device).repeat(heads, 1, 1)  # (H, C, D)
        self.bias = torch.zeros(heads, num_classes, 1, device=device)
        self.momenta = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        decay = torch.tensor([setting.weight_decay for setting in settings], device=device)
        self.decays = decay, torch.zeros_like(decay)
        # Gradients and losses share one tensor, so that one all-reduce sums them.
        sizes = [self.weight.numel(), self.bias.numel(), heads]
        self._summed = torch.zeros(sum(sizes), device=device)
        weight_gradient, bias_gradient, self._loss = self._summed.split(sizes)
        self._gradients = weight_gradient.view_as(self.weight), bias_gradient.view_as(self.bias)

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors that steps change, to be saved or overwritten in place."""
        weight, bias = self.momenta
        return {"weight": self.weight, "bias": self.bias, "momentum_of_weight": weight, "momentum_of_bias": bias}

    def logits(self, features: Tensor) -> Tensor:
        """Logits (b, H, C) of features (b, D)."""
        heads, classes, _ = self.weight.shape
        flat = torch.addmm(self.bias.view(-1), features, self.weight.view(heads * classes, -1).T)
        return flat.view(len(features), heads, classes)

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, total: int, rates: Tensor) -> Tensor:
        """One optimizer step on the mean cross-entropy of a batch; returns the (H,) losses before the step.

        All ranks call it.

        Args:
            features: (b, D), this rank's part of the batch; b may be 0.
            labels: (b,) int64.
            total: number of rows of the batch over all ranks.
            rates: (H,) learning rates.
        """
        heads, classes, _ = self.weight.shape
        log_likelihood = self.logits(features).log_softmax(dim=2)
        here = labels.view(-1, 1, 1).expand(-1, heads, 1)
        torch.div(log_likelihood.gather(2, here).sum(dim=(0, 2)), -total, out=self._loss)
        errors = log_likelihood.exp_().scatter_add_(2, here, log_likelihood.new_full(here.shape, -1.0)).div_(total)
        flat = errors.view(len(features), heads * classes)
        torch.mm(flat.T, features, out=self._gradients[0].view(heads * classes, -1))
        torch.sum(flat, dim=0, out=self._gradients[1].view(-1))
        distributed.all_reduce_sum_(self._summed)
        self._update(rates.view(-1, 1, 1))
        return self._loss.clone()

    def _update(self, rates: Tensor) -> None:
        """Steps each classifier as torch.optim.SGD or sslrun.optim.lars.LARS would, and overwrites the gradients."""
        rule, parameters = self.rule, (self.weight, self.bias)
        for parameter, change, momentum, decay in zip(
            parameters, self._gradients, self.momenta, self.decays, strict=True
        ):
            if isinstance(rule, LARS):
                weight_norm, gradient_norm = (each.flatten(1).norm(dim=1).double() for each in (parameter, change))
                ratios = trust_ratios(weight_norm, gradient_norm, decay.double(), rule.eta, rule.eps)
                change.addcmul_(parameter, decay.view(-1, 1, 1)).mul_(ratios.float().view(-1, 1, 1) * rates)
                parameter.sub_(momentum.mul_(rule.momentum).add_(change))
            else:
                change.addcmul_(parameter, decay.view(-1, 1, 1))
                momentum.mul_(rule.momentum).add_(change)
                step = change.add_(momentum, alpha=rule.momentum) if rule.nesterov else momentum
                parameter.addcmul_(step, rates, value=-1)

    @torch.no_grad()
    def score(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Scores:
        """Scores on batches of features (b, D) and labels (b,); each rank passes its own. All ranks call it."""
        heads, classes, _ = self.weight.shape
        device = self.weight.device
        loss = torch.zeros(heads, dtype=torch.float64, device=device)
        first, among_five = torch.zeros(2, heads, classes, dtype=torch.float64, device=device)
        images = torch.zeros(classes, dtype=torch.float64, device=device)
        for features, labels in batches:
            logits = self.logits(features)
            log_likelihood = logits.log_softmax(dim=2).gather(2, labels.view(-1, 1, 1).expand(-1, heads, 1))
            loss -= log_likelihood.sum(dim=(0, 2)).double()
            hits = logits.topk(min(5, classes), dim=2).indices == labels.view(-1, 1, 1)  # (b, H, 5)
            hits &= logits.isfinite().all(dim=2, keepdim=True)  # a diverged classifier is never correct
            first.index_add_(1, labels, hits[:, :, 0].T.double())
            among_five.index_add_(1, labels, hits.any(dim=2).T.double())
            images += F.one_hot(labels, classes).sum(dim=0)
        for counted in (loss, first, among_five, images):
            distributed.all_reduce_sum_(counted)
        total = images.sum()
        return Scores(loss / total, 100 * first.sum(1) / total, 100 * among_five.sum(1) / total, 100 * first / images)
