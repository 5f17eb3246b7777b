"""Rows of a bank that are drawn for each sample: the same ones on any number of ranks and with any micro-batch."""

import torch
from torch import Tensor

from sslrun.contract import Batch
from sslrun.randomness import INCREMENT, mixed_
from sslrun.runtime.distributed import rank, world_size


def keys_of(batches: list[Batch], generator: torch.Generator) -> list[Tensor]:
    """Of each of this rank's micro-batches a key (B,) int64, 0 or more, for every sample, from which its numbers are
    drawn. A key belongs to a position in the global batch; the generator is in the same state on every rank.
    """
    index = [batch.index for batch in batches]
    own = sum(map(len, index))
    keys = torch.randint(2**63 - 1, (own * world_size(),), generator=generator)
    keys = keys[rank() * own : (rank() + 1) * own].to(index[0].device, non_blocking=True)
    return list(keys.split(len(index[0])))


def uniform_indices(keys: Tensor, count: int, bound: int, excluded: Tensor | None = None) -> Tensor:
    """Draws indices from 0 to bound - 1, uniformly (up to bound / 2^63) and with replacement.

    Row b is a function of its key alone. Its k-th draw is that of SplitMix64 in the state key + k times the increment,
    so it is the same on every device. This takes about 15 passes over the result.

    Args:
        keys: (B,) int64, any numbers.
        count: number K of draws for each key.
        bound: number of indices to draw from; 2 or more with `excluded`.
        excluded: (B,) int64, the index that a row never draws; all others are equally likely.

    Returns:
        (B, K) int64.
    """
    x = torch.arange(1, count + 1, device=keys.device).mul_(INCREMENT) + keys.unsqueeze(1)
    mixed_(x).bitwise_and_(2**63 - 1)
    if excluded is None:
        return x.remainder_(bound)
    x.remainder_(bound - 1)
    return x.add_(x >= excluded.unsqueeze(1))
