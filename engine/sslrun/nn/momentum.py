"""Momentum encoders (teachers): copies of a student whose weights are a moving average of the student's."""

import copy
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from sslrun.nn.stochastic import turn_off
from sslrun.runtime.distributed import exchange_rows, world_size

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def teacher_of(student: ModuleT) -> ModuleT:
    """A copy without gradients that draws no random numbers. The executor updates its parameters; its buffers are its
    own."""
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    turn_off(teacher)
    return teacher


def cosine_momentum(base: float, fraction: float, end: float = 1.0) -> float:
    """The momentum after a `fraction` of the run: from `base` to `end` along half a cosine (BYOL: Grill et al. 2020,
    arXiv 2006.07733, section 3.3)."""
    return end - (end - base) * (math.cos(math.pi * fraction) + 1) / 2


def encode_shuffled(
    encode: Callable[[Tensor], tuple[Tensor, ...]], images: list[Tensor], generator: torch.Generator
) -> list[tuple[Tensor, ...]]:
    """Runs an encoder on images that are shuffled over the BatchNorm groups of the whole global batch, and returns its
    outputs in the original order (He et al. 2020, arXiv 1911.05722, section 3.3: "shuffling BN").

    The shuffle is over groups, not over devices, so it is the same on one device and on many.

    Args:
        encode: function from (B, 3, H, W) to tensors with B rows each, without gradient.
        images: this rank's micro-batches.
        generator: draws the permutation; in the same state on every rank.

    Returns:
        The outputs of each micro-batch.
    """
    micro_batch = len(images[0])
    order = torch.randperm(len(images) * micro_batch * world_size(), generator=generator)
    shuffled = exchange_rows(torch.cat(images) if len(images) > 1 else images[0], order)
    parts = [encode(part) for part in shuffled.split(micro_batch)]
    inverse = order.argsort()
    whole = [exchange_rows(torch.cat(outputs), inverse).split(micro_batch) for outputs in zip(*parts, strict=True)]
    return list(zip(*whole, strict=True))
