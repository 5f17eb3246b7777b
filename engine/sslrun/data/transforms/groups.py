"""Transforms made of transforms, and what a list of them does to an image's draws and sizes."""

from collections.abc import Iterator, Sequence

import numpy as np

from sslrun.data.transforms.base import Parameters, Transform

# A uniform draw is below 1, so "draw < p" is always true at p = 1; this one never is, whatever p.
_NEVER = 1.0


class RandomAppliedTrans(Transform):
    """All of a list of transforms, in order, or none of them. Groups nest; each member keeps its own p besides.

    Args:
        transforms: the members.
        p: probability of the whole group.
    """

    def __init__(self, transforms: list[Transform], p: float = 0.5) -> None:
        super().__init__(p=p)
        self.transforms = transforms
        self.num_draws = 1 + sum(t.num_draws for t in transforms)

    def parameters(self, uniforms: np.ndarray, sizes: np.ndarray) -> Parameters:
        """The members' parameters, named `MEMBER.NAME`; where the group does not apply, no member does."""
        gated = np.where(uniforms[:, :1] < self.p, uniforms[:, 1:], _NEVER)
        return chain_parameters(self.transforms, gated, sizes)

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        applied = size
        for transform in self.transforms:
            applied = transform.output_size(applied)
        return applied if self.p == 1.0 or applied == size else size if self.p == 0.0 else None


class SharedTrans(RandomAppliedTrans):
    """Transforms that do the same to all views of an image in their group of views: their draws are shared.

    Those at the head of a list are done once for each image.

    Args:
        transforms: the members, in order.
        p: probability of the whole group.
    """

    def __init__(self, transforms: list[Transform], p: float = 1.0) -> None:
        super().__init__(transforms, p)


def chain_parameters(transforms: Sequence[Transform], uniforms: np.ndarray, sizes: np.ndarray) -> Parameters:
    """Parameters of a list of transforms, each with its own range of draws and the sizes that reach it.

    Args:
        transforms: in order of application.
        uniforms: (B, sum of num_draws).
        sizes: (B, 2) entering the first.

    Returns:
        Every transform's parameters, named `INDEX.NAME`.
    """
    result: Parameters = {}
    first = 0
    for index, transform in enumerate(transforms):
        own = (
            transform.parameters(uniforms[:, first : first + transform.num_draws], sizes) if transform.num_draws else {}
        )
        first += transform.num_draws
        for name, values in own.items():
            result[f"{index}.{name}"] = values
            if name == "size" or name.endswith(".size"):
                sizes = values
    return result


def leaves(transforms: Sequence[Transform], prefix: str = "") -> Iterator[tuple[str, Transform]]:
    """The transforms of a list with its groups opened, each with the prefix of its parameters' names."""
    for index, transform in enumerate(transforms):
        if isinstance(transform, RandomAppliedTrans):
            yield from leaves(transform.transforms, f"{prefix}{index}.")
        else:
            yield f"{prefix}{index}.", transform


def members(transform: Transform) -> list[Transform]:
    """What stands in a group, at any depth."""
    own = transform.transforms if isinstance(transform, RandomAppliedTrans) else []
    return [*own, *(inner for member in own for inner in members(member))]
