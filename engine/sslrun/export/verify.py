"""Checks of an exported file that was read back: names and shapes as published, the same bits, the same outputs."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sslrun.export.architecture import Shapes, shapes_of

TOLERANCE = 1e-5


class NotTheSame(Exception):
    """The file that was read back differs from the encoder; the text says how."""


def difference(actual: Shapes, expected: Shapes) -> str | None:
    """How names and shapes differ, in words; None if they are equal."""
    if missing := [name for name in expected if name not in actual]:
        return f"{len(missing)} missing, such as {missing[0]}"
    if more := [name for name in actual if name not in expected]:
        return f"{len(more)} too many, such as {more[0]}"
    if other := [name for name in actual if actual[name] != expected[name]]:
        return f"{other[0]} is {actual[other[0]]} instead of {expected[other[0]]}"
    return None


def require_names(tensors: Mapping[str, Tensor], expected: Shapes) -> None:
    """Raises NotTheSame if names or shapes are not the expected ones."""
    wrong = difference(shapes_of(tensors), expected)
    if wrong is not None:
        raise NotTheSame(f"its names are not the published ones: {wrong}")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether dtype, shape and every bit are equal; a NaN equals itself. Of any dtype."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (tensor.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)


def require_same(backbone: nn.Module, tensors: Mapping[str, Tensor], images: Tensor) -> None:
    """Raises NotTheSame unless the tensors are the backbone's to the bit, and a copy of the backbone that is filled
    with nothing but them gives the same outputs for images."""
    own = backbone.state_dict()
    for name, tensor in tensors.items():
        if not same_bits(tensor, own[name]):
            raise NotTheSame(f"{name} is not what was written")
    fresh = copy.deepcopy(backbone)
    for tensor in fresh.state_dict().values():  # a tensor that is not filled changes the outputs
        tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    fresh.load_state_dict(tensors)
    require_equal(features(backbone), features(fresh), images)


def require_equal(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], images: Tensor, tolerance: float = TOLERANCE
) -> None:
    """Raises NotTheSame if outputs differ by more than `tolerance` times the largest of them (or times 1)."""
    expected, actual = ours(images), theirs(images)
    error = (expected - actual).abs().max().item() if actual.shape == expected.shape else torch.nan
    if not error <= tolerance * max(1.0, expected.abs().max().item()):
        raise NotTheSame(f"its outputs for {len(images)} images differ by {error:.1e}")


def features(backbone: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that gives the (B, D) features of images: the backbone's last output, averaged over positions."""

    @torch.no_grad()
    def of(images: Tensor) -> Tensor:
        last = backbone(images)[-1]
        return last.mean(dim=(2, 3)) if last.dim() == 4 else last

    return of
