"""Groups of equal views: a recipe's `[[data.views]]` tables."""

import copy
import itertools
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from sslrun.data.masks import Mask
from sslrun.data.transforms import Normalize, Transform
from sslrun.errors import UsageError


@dataclass
class ViewGroup:
    """Views that are made the same way and have the same size.

    Attributes:
        num_views: number of views of each image in this group.
        transforms: transforms that make a view of an image, in order.
        mask: which patches of each view are hidden from the network, for methods that predict them.
    """

    num_views: int = 1
    transforms: list[Transform] = field(default_factory=list)
    mask: Mask | None = None

    def __post_init__(self) -> None:
        if self.num_views < 1:
            raise UsageError(f"num_views must be at least 1, not {self.num_views}")
        inner = [member for transform in self.transforms for member in transform.members()]
        normalize = [transform for transform in [*self.transforms, *inner] if isinstance(transform, Normalize)]
        if len(normalize) > 1 or any(isinstance(member, Normalize) for member in inner):
            raise UsageError("Normalize may stand once in a list of transforms, outside of groups")
        after = self.transforms[self.transforms.index(normalize[0]) + 1 :] if normalize else []
        if not all(step.is_flip for transform in after for step in transform.steps()):
            raise UsageError("Normalize must be the last of the transforms (only a flip may follow)")
        self.normalize = normalize[0] if normalize else Normalize(mean=(0, 0, 0), std=(1, 1, 1))
        self.is_normalized = bool(normalize)
        for member in inner:
            if member.shared or member.view_draw is not None:
                raise UsageError(f"{type(member).__name__} must stand in the list of transforms itself, not in a group")
        for step in self.steps:
            if step.num_views not in (None, self.num_views):
                raise UsageError(f"num_views is {self.num_views}, but {type(step).__name__} has {step.num_views} cells")
        size: tuple[int, int] | None = None
        for transform in self.transforms:
            size = transform.output_size(size)
        if size is None:
            raise UsageError(
                "these transforms leave images of different sizes, which cannot form a batch: "
                "give them a RandomResizedCrop, CenterCrop or Resize = [height, width] that always applies"
            )
        self.size = size  # height and width of every view
        if self.mask is not None:
            self.mask.grid(size)

    @property
    def channels(self) -> int:
        """Channels of the images that it takes."""
        return len(self.normalize.mean)

    def for_channels(self, channels: int) -> "ViewGroup":
        """The group, for images of this number of channels.

        Raises:
            UsageError: a transform cannot take them, or Normalize has another number of means.
        """
        for step in self.steps:
            step.check_channels(channels)
        if self.channels == channels:
            return self
        if self.is_normalized:
            raise UsageError(
                f"Normalize has a mean and std of {self.channels} channels, but the images have {channels} "
                "(channels of the source)"
            )
        group = copy.copy(self)
        group.normalize = Normalize(mean=(0,) * channels, std=(1,) * channels)
        return group

    @cached_property
    def num_draws(self) -> int:
        """Uniform draws of each view of an image."""
        return sum(transform.num_draws for transform in self.transforms)

    @cached_property
    def shared_draws(self) -> np.ndarray:
        """(num_draws,) bool: which draws all views of an image have in common."""
        return np.repeat([t.shared for t in self.transforms], [t.num_draws for t in self.transforms])

    @cached_property
    def view_draws(self) -> list[int]:
        """Which draws encode the view of the group; see `Transform.view_draw`."""
        starts = itertools.accumulate((transform.num_draws for transform in self.transforms), initial=0)
        return [start + t.view_draw for start, t in zip(starts, self.transforms) if t.view_draw is not None]  # noqa: B905

    @cached_property
    def steps(self) -> list[Transform]:
        """The transforms that change pixels, in order: groups of transforms opened, Normalize left out."""
        return [step for transform in self.transforms for step in transform.steps()]

    @cached_property
    def num_common(self) -> int:
        """Number of leading steps that give the same result for all views of an image; they run once per image."""
        leading = itertools.takewhile(lambda transform: transform.shared, self.transforms)
        return sum(len(transform.steps()) for transform in leading) if self.num_views > 1 else 0
