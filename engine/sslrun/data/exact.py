"""The exact stage: the transforms of a recipe in plain torch, following PIL's arithmetic to the rounding.

Pictures between two operations are planar float tensors that hold whole numbers from 0 to 255, so that each operation
starts from what PIL would have stored. Sums are of whole numbers small enough to be exact, so no result depends on
threads, on the batch or on the order of summation.
"""

from collections.abc import Sequence

import torch

from sslrun.data.graph import Arguments, Part
from sslrun.data.transforms import ViewGroup


class ExactStage:
    """Turns decoded pictures into views.

    Args:
        views: view groups.
        device: where the views are made and handed out.
    """

    def __init__(self, views: Sequence[ViewGroup], device: torch.device) -> None:
        self.views = list(views)
        self.device = device

    def __call__(self, decoded: Sequence[torch.Tensor], arguments: Arguments) -> list[torch.Tensor]:
        """All transforms, from whole pictures.

        Args:
            decoded: B pictures, (H, W, 3) uint8 RGB on the CPU, each of its own size.
            arguments: of `view_arguments` for these pictures.

        Returns:
            For each view group (num_views * B, 3, h, w) float32, normalised, channels-last, view-major.
        """
        raise NotImplementedError

    def finish(self, crops: Sequence[torch.Tensor], arguments: Arguments, part: Part) -> list[torch.Tensor]:
        """What is left after the graph has done its part.

        Args:
            crops: for each view, group by group, (B, h, w, 3) uint8 on any device.
            arguments: of `view_arguments` for these pictures.
            part: what the graph has done.

        Returns:
            As `__call__`, on the stage's device.
        """
        raise NotImplementedError
