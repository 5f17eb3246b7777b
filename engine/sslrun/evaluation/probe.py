"""A linear probe of a network under training: logistic regression on its features, fitted from scratch each time.

A probe could also be trained along with the network, one step on each batch. Fitted from scratch, it measures the
current features and not an average over time, has no state in checkpoints, and does not touch the training step, where
the network is compiled, sharded and called differently by each method. Its only cost is the fit, since k-NN uses the
same features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.evaluation.frozen_encoder import numbered
from sslrun.runtime import distributed, signals
from sslrun.runtime.numerics import in_full_float32
from sslrun.runtime.signals import Stopped

WEIGHT_DECAY = 1e-3
MOST_ITERATIONS = 100


@in_full_float32()
def linear_probe(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, device: torch.device
) -> dict[str, float]:
    """`probe/top1_pct` and `probe/loss` (cross-entropy) of the queries, the same on all ranks; all ranks call it.

    Rank 0 fits, with all features in its device's memory.

    Args:
        bank: (n, D), this rank's share of the N features to learn from.
        bank_labels: (N,) int64 classes of all N.
        queries: (m, D), this rank's share of the M features to classify.
        query_labels: (M,) int64 classes of all M.
        device: where to compute.
    """
    numbers, num_classes = numbered(bank_labels, query_labels)
    labels = [each.to(device) for each in numbers]
    rows = [
        distributed.all_gather_shares(share.to(device).float(), len(of_all))
        for share, of_all in zip((bank, queries), labels, strict=True)
    ]

    def measure() -> dict[str, float]:
        weight, bias = fit(rows[0], labels[0], num_classes)
        logits = F.linear(rows[1], weight, bias)
        right = logits.argmax(1) == labels[1]
        return {
            "probe/top1_pct": 100 * right.float().mean().item(),
            "probe/loss": F.cross_entropy(logits, labels[1]).item(),
        }

    return distributed.from_rank_0(measure)


@torch.no_grad()
def fit(
    features: Tensor, labels: Tensor, num_classes: int, weight_decay: float = WEIGHT_DECAY
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression on standardized features, by L-BFGS.

    It minimizes the mean cross-entropy plus weight_decay / 2 times the sum of the squared weights (without biases).

    Args:
        features: (N, D) fp32.
        labels: (N,) int64.
        num_classes: number of classes C.
        weight_decay: weight decay of the weights, for features of standard deviation 1.

    Returns:
        Weights (C, D) and biases (C,), for the features before standardization.
    """
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    scale = torch.where(deviation > 1e-6 * features.abs().amax(0), 1 / deviation, 0)  # 0 for constant features
    rows = (features - mean) * scale
    weight = features.new_zeros(num_classes, features.shape[1]).requires_grad_()
    bias = features.new_zeros(num_classes).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MOST_ITERATIONS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    @torch.enable_grad()
    def loss() -> Tensor:
        if code := signals.requested():  # the others wait for rank 0 and get what it raises
            raise Stopped(code)
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(rows, weight, bias), labels) + weight_decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = weight.detach() * scale, bias.detach()
    return weight, bias - weight @ mean
