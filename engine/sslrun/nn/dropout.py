"""Dropout whose masks depend neither on how a global batch is divided nor on random state."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sslrun.randomness import INCREMENT, as_uniform, mixed_
from sslrun.runtime import distributed


def dropout_masks(
    num_micro_batches: int, shape: tuple[int, int], p: float | Sequence[float], seed: int, device: torch.device
) -> list[Tensor]:
    """Factors for this rank's micro-batches: 0 with probability p, else 1 / (1 - p) (Srivastava et al. 2014, with the
    scaling in training instead of in evaluation).

    Each number is a hash (SplitMix64) of the seed and of its position in the global batch, so it does not depend on the
    device, the number of ranks or accumulation.

    Args:
        num_micro_batches: number of micro-batches of this rank.
        shape: shape (B, C) of the mask of a micro-batch.
        p: dropout rate, 0 to below 1; one number, or one for each of the C columns.
        seed: a number that is equal on every rank and different at every step.
        device: device of the masks.

    Returns:
        (B, C) fp32 for each micro-batch.
    """
    rows, columns = shape
    count = num_micro_batches * rows * columns
    first = distributed.rank() * count
    start = mixed_(torch.tensor(seed + INCREMENT))  # mixed, so that masks of successive seeds do not overlap
    x = mixed_(torch.arange(first, first + count, device=device) + start)
    uniform = as_uniform(x).view(num_micro_batches, rows, columns)
    rates = torch.tensor(p).to(device, non_blocking=True)
    return list(((uniform >= rates) / (1 - rates)).unbind())
