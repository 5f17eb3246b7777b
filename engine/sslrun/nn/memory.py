"""Stores of embeddings that outlive a step: buffers, so that a checkpoint holds them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Queue(nn.Module):
    """First-in-first-out store of K normalised rows (He et al. 2020, arXiv 1911.05722, section 3.2).

    Starts with random directions. Rows are overwritten oldest first; any number may be pushed at once.
    """

    rows: Tensor
    oldest: Tensor

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        if length < 1 or dim < 1:
            raise ValueError(f"a queue of {length} x {dim} rows is empty")
        self.register_buffer("rows", F.normalize(torch.randn(length, dim), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))  # a tensor: no host synchronisation

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Overwrite the oldest len(rows) entries; where there are more rows than places, the last ones stay."""
        length = len(self.rows)
        pushed = len(rows)
        kept = rows[-length:]
        offset = torch.arange(pushed - len(kept), pushed, device=rows.device)
        self.rows.index_copy_(0, (self.oldest + offset) % length, kept.to(self.rows.dtype))
        self.oldest.add_(pushed).remainder_(length)
