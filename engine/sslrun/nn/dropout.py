"""Dropout whose mask does not depend on how a global batch is cut up, nor on any hidden random state."""

import torch
from torch import Tensor

from sslrun.runtime import distributed

_FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's


def dropout_masks(
    num_micro_batches: int, shape: tuple[int, int], p: float, seed: int, device: torch.device
) -> list[Tensor]:
    """What this rank's micro-batches are multiplied with: 0 with probability p, else 1 / (1 - p) (Srivastava et al.
    2014, with the scaling in training rather than in use).

    Each number is a hash (SplitMix64) of the seed and of its place in the global batch: the same on every device and
    for every cut, and nobody draws what another rank needs.

    Args:
        num_micro_batches: of this rank.
        shape: (B, C) of a micro-batch.
        p: 0 to below 1.
        seed: equal on every rank, another at every step.
        device: where the masks are made.

    Returns:
        (B, C) fp32 for each micro-batch.
    """
    rows, columns = shape
    count = num_micro_batches * rows * columns
    first = distributed.rank() * count if distributed.world_size() > 1 else 0
    x = torch.arange(first, first + count, device=device) + _mixed(seed)
    x = (x ^ _shifted(x, 30)) * _signed(_FACTORS[0])
    x = (x ^ _shifted(x, 27)) * _signed(_FACTORS[1])
    uniform = _shifted(x ^ _shifted(x, 31), 40).float() / 2**24
    return list(((uniform >= p) / (1 - p)).view(num_micro_batches, rows, columns).unbind())


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(seed: int) -> int:
    """SplitMix64 of a number, so that the places of one step are not those of the next, shifted; an int64."""
    x = seed + 0x9E3779B97F4A7C15
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        x = ((x ^ (x >> shift)) * factor) % 2**64
    return _signed(x ^ (x >> 31))


def _signed(x: int) -> int:
    """The int64 with the bits of an unsigned one."""
    return x - 2**64 if x >= 2**63 else x
