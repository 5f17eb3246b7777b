"""Whether what was written is what was meant: names and shapes as published, and the same outputs."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sslrun.export.architecture import Shapes

TOLERANCE = 1e-5


class NotTheSame(Exception):
    """What was read back differs from what was to be written; the text says in what."""


def shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def difference(found: Mapping[str, tuple[int, ...]], published: Mapping[str, tuple[int, ...]]) -> str | None:
    """In what names and shapes differ, in words; None if in nothing."""
    if missing := [name for name in published if name not in found]:
        return f"{len(missing)} missing, such as {missing[0]}"
    if more := [name for name in found if name not in published]:
        return f"{len(more)} too many, such as {more[0]}"
    if other := [name for name in found if found[name] != published[name]]:
        return f"{other[0]} is {found[other[0]]} instead of {published[other[0]]}"
    return None


def require_names(found: Mapping[str, Tensor], published: Mapping[str, tuple[int, ...]]) -> None:
    wrong = difference(shapes(found), published)
    if wrong is not None:
        raise NotTheSame(f"its names are not the published ones: {wrong}")


def require_same(backbone: nn.Module, tensors: Mapping[str, Tensor], images: Tensor) -> None:
    """These tensors must be the backbone's to the bit, and another copy of it that is filled with nothing else must see
    in images what it sees."""
    own = backbone.state_dict()
    for name, tensor in tensors.items():
        if not torch.equal(tensor, own[name]):
            raise NotTheSame(f"{name} is not what was written")
    fresh = copy.deepcopy(backbone)
    for tensor in fresh.state_dict().values():  # whatever is not filled shows
        tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    fresh.load_state_dict(tensors)
    require_equal(features(backbone), features(fresh), images)


def require_equal(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], images: Tensor, tolerance: float = TOLERANCE
) -> None:
    """Equal outputs, but for `tolerance` of the largest of them (or of 1)."""
    expected, found = ours(images), theirs(images)
    error = (expected - found).abs().max().item() if found.shape == expected.shape else torch.nan
    if not error <= tolerance * max(1.0, expected.abs().max().item()):
        raise NotTheSame(f"its outputs for {len(images)} images differ by {error:.1e}")


def features(backbone: nn.Module) -> Callable[[Tensor], Tensor]:
    """(B, D) features of images under a backbone in evaluation mode: its last output, averaged over positions."""

    @torch.no_grad()
    def of(images: Tensor) -> Tensor:
        last = backbone(images)[-1]
        return last.mean(dim=(2, 3)) if last.dim() == 4 else last

    return of
