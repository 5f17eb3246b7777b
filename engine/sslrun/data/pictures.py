"""Views as they enter the network, made visible."""

from collections.abc import Sequence

import numpy as np
import torch

from sslrun.contract import Batch
from sslrun.data.views import ViewGroup

MOST_ROWS = 8
GAP = 4  # pixels between two views
PAPER = 242  # gray level of what is between them


def as_bytes(views: torch.Tensor, group: ViewGroup) -> np.ndarray:
    """Undo the normalization: (N, C, h, w) float to (N, h, w, C) uint8."""
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (group.normalize.mean, group.normalize.std)
    )
    levels = (views.cpu().double() * std + mean) * 255
    return levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Pixels (..., C) as RGB (..., 3): the first three channels; with fewer than three, the first as gray."""
    return pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)


def sheet(batch: Batch, groups: Sequence[ViewGroup]) -> np.ndarray:
    """The first samples of a batch as one image, (H, W, 3) uint8: a row for each, its views side by side.

    The host waits for the device. Of images with other than three channels, the first three are shown, or the first in
    gray.

    Args:
        batch: B samples with their views.
        groups: the recipe's view groups.
    """
    count = len(batch.index)
    rows = min(count, MOST_ROWS)
    columns = [
        as_rgb(as_bytes(views[view * count : view * count + rows], group))
        for views, group in zip(batch.views, groups, strict=True)
        for view in range(group.num_views)
    ]
    height = max(column.shape[1] for column in columns)
    width = sum(column.shape[2] + GAP for column in columns)
    whole = np.full((rows * (height + GAP) - GAP, width - GAP, 3), PAPER, dtype=np.uint8)
    left = 0
    for column in columns:
        for row, view in enumerate(column):
            top = row * (height + GAP)
            whole[top : top + view.shape[0], left : left + view.shape[1]] = view
        left += column.shape[2] + GAP
    return whole
