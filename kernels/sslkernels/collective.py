"""Gathers the rows of all ranks of a group."""

import torch.distributed as dist
from torch import Tensor

_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


def gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(B, ...) per rank -> (ranks x B, ...) in rank order, without gradient. A group of None is this process alone."""
    if group is None:
        return x.detach()
    gathered = x.new_empty((dist.get_world_size(group) * len(x), *x.shape[1:]))
    _gather_into(gathered, x.detach().contiguous(), group=group)
    return gathered


def first_row(x: Tensor, group: dist.ProcessGroup | None) -> int:
    """Index of this rank's first row in the result of `gather_rows`."""
    return 0 if group is None else dist.get_rank(group) * len(x)
