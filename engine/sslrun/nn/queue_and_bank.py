"""Stores of embeddings from earlier steps. They are buffers, so that a checkpoint holds them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.nn.argument_checks import require_fraction


class Queue(nn.Module):
    """First-in-first-out store of K normalized rows (He et al. 2020, arXiv 1911.05722, section 3.2).

    It starts with random directions. The oldest rows are overwritten first; any number may be pushed at once.

    Args:
        length: number of rows K.
        dim: length of a row.
        starts_empty: whether the rows start as zeros instead; `is_full` is true when all have been written.
    """

    rows: Tensor
    oldest: Tensor

    def __init__(self, length: int, dim: int, starts_empty: bool = False) -> None:
        super().__init__()
        if length < 1 or dim < 1:
            raise ValueError(f"a queue of {length} x {dim} rows is empty")
        rows = torch.zeros(length, dim) if starts_empty else F.normalize(torch.randn(length, dim), dim=1)
        self.register_buffer("rows", rows)
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))  # on the device, so that no step waits

    def is_full(self) -> Tensor:
        """Whether all rows have been written, 0-d bool. Rows are written in order, so the last row shows it."""
        return self.rows[-1].any()

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Overwrites the oldest len(rows) entries; if there are more rows than entries, the last rows stay."""
        length = len(self.rows)
        pushed = len(rows)
        kept = rows[-length:]
        offset = torch.arange(pushed - len(kept), pushed, device=rows.device)
        self.rows.index_copy_(0, (self.oldest + offset) % length, kept.to(self.rows.dtype))
        self.oldest.add_(pushed).remainder_(length)


class Bank(nn.Module):
    """A normalized row for every sample: a moving average of its embeddings (Wu et al. 2018, arXiv 1805.01978, section
    3.1 and, for the momentum, the authors' code).

    It starts with random directions.

    Args:
        length: number of samples N.
        dim: dimension D of the embeddings.
        momentum: weight of the new embedding in the row, 0 to 1; 1 replaces the row.
        generator: generator of the initial rows; torch's global one by default.
    """

    rows: Tensor

    def __init__(self, length: int, dim: int, momentum: float = 0.5, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if length < 1 or dim < 1:
            raise ValueError(f"a bank of {length} x {dim} rows is empty")
        require_fraction(momentum=momentum)
        self.momentum = momentum
        self.register_buffer("rows", F.normalize(torch.randn(length, dim, generator=generator), dim=1))

    @torch.no_grad()
    def update(self, index: Tensor, embeddings: Tensor) -> None:
        """rows[i] = l2((1 - momentum) rows[i] + momentum z_i); if a sample occurs twice, its last z_i counts.

        Args:
            index: (B,) int64, sample ids.
            embeddings: (B, D), normalized.
        """
        latest = embeddings[last_occurrence(index)].to(self.rows.dtype)
        rows = F.normalize(torch.lerp(self.rows[index], latest, self.momentum), dim=1)
        self.rows.index_copy_(0, index, rows)  # a repeated index has equal rows, so their order does not matter


def last_occurrence(index: Tensor) -> Tensor:
    """(B,) int64: for each entry of `index` (B,), the last position with the same value."""
    ordered, position = index.sort(stable=True)
    return position[torch.searchsorted(ordered, index, right=True) - 1]
