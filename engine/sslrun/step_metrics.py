"""Means of the step metrics between two rows of the log, kept on the device until they are read."""

from typing import Any

import torch
from torch import Tensor

from sslrun.runtime import distributed


class StepMetrics:
    """Sums of each metric since the last row. A checkpoint holds them, so that a resumed run writes the same rows.

    Args:
        dtype: of the metrics.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype
        self.steps = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add a step's metrics; does not wait for the device."""
        self.steps += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.detach().clone()

    def read(self) -> dict[str, float]:
        """Means over steps and ranks; the sums start again at 0. Here alone the loop waits for the device."""
        means = {name: sum(shares) / len(shares) / self.steps for name, shares in self._shares().items()}
        self.steps, self.sums = 0, {}
        return means

    def state(self) -> dict[str, Any]:
        """The state as JSON: the sums of each rank, because means of means round differently."""
        return {"steps": self.steps, "sums": self._shares()}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from `state()`; on another number of ranks each rank takes the mean."""
        self.steps = state["steps"]
        ranks, rank = distributed.world_size(), distributed.rank()
        self.sums = {
            name: torch.tensor(
                shares[rank] if len(shares) == ranks else sum(shares) / len(shares), dtype=self._dtype, device=device
            )
            for name, shares in state["sums"].items()
        }

    def _shares(self) -> dict[str, list[float]]:
        """The sums of every rank."""
        if not self.sums:
            return {}
        mine = torch.stack([total.to(self._dtype) for total in self.sums.values()])
        gathered = distributed.all_gather_rows(mine.unsqueeze(0))
        return dict(zip(self.sums, gathered.T.tolist(), strict=True))
