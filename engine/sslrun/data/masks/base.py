"""The contract of a mask: which patches of each view a method hides from its network.

A mask is one class in one file. Like the numbers of a transform it is a pure function of (seed, epoch, position, view),
so that it depends neither on the number of ranks nor on micro-batches, and a resumed run draws it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sslrun import randomness
from sslrun.config.component import Component
from sslrun.errors import UsageError

if TYPE_CHECKING:
    from sslrun.data.views import ViewGroup


@dataclass(frozen=True)
class MaskDraws:
    """The random numbers of the masks of N views: row v * B + b belongs to view v of sample b.

    Attributes:
        seed: of the run.
        epoch: from 0.
        positions: (B,) places of the samples in the epoch.
        views: numbers of the group's views, counted through all view groups.
    """

    seed: int
    epoch: int
    positions: np.ndarray
    views: range

    def uniforms(self, first: int, count: int) -> np.ndarray:
        """(N, count) in [0, 1): draws `first` to `first + count` of each view's own."""
        offset = randomness.MASK_OFFSET + first
        return np.concatenate(
            [randomness.uniforms(self.seed, self.epoch, self.positions, view, count, offset) for view in self.views]
        )

    def slots(self, samples: int) -> np.ndarray:
        """(N,) a number for each view: those of `samples` consecutive positions have 0 to V * samples - 1, shuffled.

        With them views share out what each of them must have once, such as ratios.
        """
        blocks, places = np.unique(self.positions // samples, return_inverse=True)
        count = samples * len(self.views)
        keys = randomness.uniforms(self.seed, self.epoch, blocks, self.views.start, count, randomness.SLOT_OFFSET)
        slots = keys.argsort(axis=1, kind="stable")
        own = self.positions % samples
        return np.concatenate([slots[places, own + v * samples] for v in range(len(self.views))])


class Mask(Component, kind="masks"):
    """Chooses the patches of a view that are hidden from the network.

    Args:
        patch_size: side of a patch in pixels, that of the backbone.
    """

    def __init__(self, patch_size: int = 16) -> None:
        if patch_size < 1:
            raise UsageError(f"patch_size must be at least 1, not {patch_size}")
        self.patch_size = patch_size

    def draw(self, draws: MaskDraws, grid: tuple[int, int]) -> np.ndarray:
        """The masks of the views that `draws` is for: a pure function of its random numbers.

        Args:
            draws: random numbers of N views.
            grid: rows and columns of patches in a view.

        Returns:
            (N, rows, columns) bool, True where the patch is hidden.
        """
        raise NotImplementedError

    def blocks(self, draws: MaskDraws, grid: tuple[int, int]) -> np.ndarray | None:
        """The blocks of hidden patches that a method is to predict one by one, as places of patches, row by row: (N,
        M, n) int64, M blocks of n patches in each view. None if the mask has none. Arguments as in `draw`."""
        return None

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in a view.

        Args:
            size: height and width of the view in pixels.

        Raises:
            UsageError: it does not consist of whole patches.
        """
        if size[0] % self.patch_size or size[1] % self.patch_size:
            raise UsageError(f"{size[0]} x {size[1]} pixels do not consist of patches of {self.patch_size} pixels")
        return size[0] // self.patch_size, size[1] // self.patch_size


def masks_of(groups: Sequence[ViewGroup], seed: int, epoch: int, positions: np.ndarray) -> list[np.ndarray | None]:
    """The masks of a batch of B samples: for each view group (num_views * B, rows, columns) bool, view-major, or None.

    Args:
        groups: view groups; views are numbered through over all groups.
        seed: of the run.
        epoch: from 0.
        positions: (B,) places of the samples in the epoch.
    """
    return [
        None if group.mask is None else group.mask.draw(draws, group.mask.grid(group.size))
        for group, draws in _draws_of(groups, seed, epoch, positions)
    ]


def blocks_of(groups: Sequence[ViewGroup], seed: int, epoch: int, positions: np.ndarray) -> list[np.ndarray | None]:
    """`Mask.blocks` for each view group, view-major; None where there are none. Arguments as in `masks_of`."""
    return [
        None if group.mask is None else group.mask.blocks(draws, group.mask.grid(group.size))
        for group, draws in _draws_of(groups, seed, epoch, positions)
    ]


def _draws_of(
    groups: Sequence[ViewGroup], seed: int, epoch: int, positions: np.ndarray
) -> Iterator[tuple[ViewGroup, MaskDraws]]:
    first = 0
    for group in groups:
        views = range(first, first + group.num_views)
        first += group.num_views
        yield group, MaskDraws(seed, epoch, positions, views)
