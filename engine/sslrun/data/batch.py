"""What the data room hands over: the only thing that methods know of it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank. B samples.

    Attributes:
        views: one tensor per view group, view-major, (num_views x B) 3 H W, float, normalised, channels-last: row i and
            row i + B of a group are two views of one picture.
        index: B, int64, sample ids in the source.
        label: B, int64, or None where the source has no labels. Only probes may read it.
    """

    views: list[torch.Tensor]
    index: torch.Tensor
    label: torch.Tensor | None

    def crops(self) -> list[torch.Tensor]:
        """Every view of every group by itself, each (B, 3, H, W), in the order of the recipe."""
        return [view for group in self.views for view in group.split(len(self.index))]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; copies do not wait."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch([move(v) for v in self.views], move(self.index), None if self.label is None else move(self.label))
