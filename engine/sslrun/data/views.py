"""Groups of equal views: a recipe's `[[data.views]]` tables."""

import itertools
import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from sslrun.data.transforms import (
    GaussianBlur,
    Normalize,
    RandomGridPatch,
    RandomHorizontalFlip,
    SharedTrans,
    Transform,
)
from sslrun.data.transforms.color import BLUR_REACH
from sslrun.data.transforms.groups import leaves, members
from sslrun.errors import UsageError


@dataclass
class ViewGroup:
    """Views that are made the same way and have the same size.

    Attributes:
        num_views: how many views of each image.
        transforms: what makes a view of an image, in order.
    """

    num_views: int = 1
    transforms: list[Transform] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.num_views < 1:
            raise UsageError(f"num_views must be at least 1, not {self.num_views}")
        opened = [transform for _, transform in leaves(self.transforms)]
        normalize = [transform for transform in opened if isinstance(transform, Normalize)]
        if len(normalize) > 1 or any(transform not in self.transforms for transform in normalize):
            raise UsageError("Normalize may stand once in a list of transforms, outside of groups")
        after = opened[opened.index(normalize[0]) + 1 :] if normalize else []
        if not all(isinstance(transform, RandomHorizontalFlip) for transform in after):
            raise UsageError("Normalize must be the last of the transforms (only a flip may follow)")
        self.normalize = normalize[0] if normalize else Normalize(mean=(0, 0, 0), std=(1, 1, 1))
        for inner in (member for transform in self.transforms for member in members(transform)):
            if isinstance(inner, SharedTrans) or inner.view_draw is not None:
                raise UsageError(f"{type(inner).__name__} must stand in the list of transforms itself, not in a group")
        for transform in opened:
            if isinstance(transform, RandomGridPatch) and transform.grid**2 != self.num_views:
                raise UsageError(f"num_views is {self.num_views}, but RandomGridPatch has {transform.grid**2} cells")
        if self._fixed_size() is None:
            raise UsageError(
                "these transforms leave images of different sizes, which cannot form a batch: "
                "give them a RandomResizedCrop, CenterCrop or Resize = [height, width] that always applies"
            )
        for transform in opened:
            if isinstance(transform, GaussianBlur) and min(self.size) <= math.ceil(BLUR_REACH * transform.sigma_max):
                raise UsageError(f"views of {min(self.size)} pixels are too small for a blur of {transform.sigma_max}")

    @cached_property
    def num_draws(self) -> int:
        """Uniform draws of each view of an image."""
        return sum(transform.num_draws for transform in self.transforms)

    @cached_property
    def shared_draws(self) -> np.ndarray:
        """(num_draws,) bool: which draws all views of an image have in common."""
        return np.repeat([isinstance(t, SharedTrans) for t in self.transforms], [t.num_draws for t in self.transforms])

    @cached_property
    def view_draws(self) -> list[int]:
        """Which draws say what view of the group it is; see `Transform.view_draw`."""
        starts = itertools.accumulate((transform.num_draws for transform in self.transforms), initial=0)
        return [start + t.view_draw for start, t in zip(starts, self.transforms) if t.view_draw is not None]  # noqa: B905

    @cached_property
    def steps(self) -> list[tuple[str, Transform]]:
        """What changes pixels, in order, with the prefix of its parameters; groups opened, Normalize left out."""
        return [(prefix, t) for prefix, t in leaves(self.transforms) if not isinstance(t, Normalize)]

    @cached_property
    def num_geometric(self) -> int:
        """How many of the first steps only move pixels."""
        kinds = [transform.geometric for _, transform in self.steps]
        return kinds.index(False) if False in kinds else len(kinds)

    @cached_property
    def num_common(self) -> int:
        """How many of the first steps do the same to all views, where there are several: they are done once."""
        leading = itertools.takewhile(lambda transform: isinstance(transform, SharedTrans), self.transforms)
        return len(list(leaves(list(leading)))) if self.num_views > 1 else 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every view."""
        size = self._fixed_size()
        assert size is not None
        return size

    def _fixed_size(self) -> tuple[int, int] | None:
        size: tuple[int, int] | None = None
        for transform in self.transforms:
            size = transform.output_size(size)
        return size
