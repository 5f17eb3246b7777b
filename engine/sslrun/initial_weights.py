"""The weights that a new run takes from `load_from`: what is resized or copied, and what is said of the rest."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sslrun.contract import Backbone, Method, Progress
from sslrun.errors import UsageError
from sslrun.nn.sobel import Sobel
from sslrun.nn.vit import VisionTransformer, grid_of, resized_positions
from sslrun.runtime import checkpoint
from sslrun.runtime.executor import Executor
from sslrun.runtime.mismatch import Mismatch

logger = logging.getLogger("sslrun")

LEAST_SHARE = 0.5  # of the numbers in the backbone's tensors: with fewer, a run would begin almost from random weights
_BACKBONE = "backbone."


def load_initial_weights(executor: Executor, path: Path, is_strict: bool, progress: Progress) -> None:
    """Sets the model's weights from a file or a checkpoint, and logs what fits; a warning if more than heads misfit.

    Args:
        executor: it holds the model; every rank calls it.
        path: the run, checkpoint or file of `load_from`.
        is_strict: whether it must contain exactly the model's weights. If not, learned positions of another number of
            patches are interpolated, the first convolution or patch projection is made one for the model's number of
            channels, and momentum encoders that it lacks start as copies of their students.
        progress: the run's first step.

    Raises:
        UsageError: the file cannot be read; it is not the model's and must be; or so few of its weights fit that less
            than LEAST_SHARE of the backbone would be filled. Nothing has been changed.
    """
    weights = _by_our_names(executor.method.backbone, checkpoint.load_weights(path))
    if not is_strict:
        weights |= _resized(executor, weights)
        weights |= _of_other_channels(executor, weights)
        weights |= _teachers_weights(executor.method, weights, progress)
    mismatch = executor.mismatch(weights)
    share = _filled_share(executor, mismatch)
    if share < LEAST_SHARE:
        raise UsageError(
            f"{path} fills {100 * share:.0f} % of the backbone, of which load_from must fill {100 * LEAST_SHARE:.0f} % "
            f"or more: {mismatch}; {checkpoint.foreign_hint(path)}"
        )
    if is_strict and not mismatch.fits:
        raise UsageError(f"{path} does not fit the model: {mismatch}; load_strict = false takes the weights that fit")
    executor.load_state(weights, strict=is_strict, converts=True)
    filled = "" if share == 1 else f"{100 * share:.0f} % of the backbone is filled; "
    converted = ", converted to the model's" if mismatch.recast else ""
    level = logging.WARNING if share < 1 or mismatch.reshaped else logging.INFO
    logger.log(level, "weights from %s; %s%s%s", path, filled, str(mismatch) or "all of them fit", converted)


def load_frozen_weights(executor: Executor, place: str, path: Path) -> None:
    """Sets all weights of a network of the model from the backbone in a file or a checkpoint.

    Args:
        executor: it holds the model; every rank calls it.
        place: the network's name in the model.
        path: a run, checkpoint or file, as for `load_from`.

    Raises:
        UsageError: the file cannot be read, or its backbone is another network. Nothing has been changed.
    """
    network = executor.method.get_submodule(place)
    assert isinstance(network, Backbone)
    theirs = _by_our_names(network, checkpoint.load_weights(path))
    inside = {n.removeprefix(_BACKBONE): tensor for n, tensor in theirs.items() if n.startswith(_BACKBONE)}
    weights = {f"{place}.{name}": tensor for name, tensor in inside.items()}
    weights |= _resized(executor, weights)
    mismatch = executor.mismatch(weights)
    missing = [name for name in mismatch.missing if name.startswith(f"{place}.")]
    if missing or mismatch.unexpected or mismatch.reshaped:
        wrong = replace(mismatch, missing=missing)
        raise UsageError(f"{path} is not the weights of {place}: {wrong}; {checkpoint.foreign_hint(path)}")
    executor.load_state(weights, strict=False, converts=True)
    logger.info("weights of %s from %s", place, path)


def _by_our_names(backbone: Backbone, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a network of timm or torchvision, which have its names, by those that they have in the model.

    Args:
        backbone: the model's backbone; all weights stay as they are if it is none of these.
        weights: with the library's names, also behind "backbone." (as `sslrun import-weights` writes them).
    """
    network = getattr(backbone, "net", None)
    if not isinstance(network, nn.Module) or any(name.startswith(f"{_BACKBONE}net.") for name in weights):
        return weights
    theirs = network.state_dict()
    ours = {name: f"{_BACKBONE}net.{own}" for name in weights if (own := name.removeprefix(_BACKBONE)) in theirs}
    return {ours.get(name, name): tensor for name, tensor in weights.items()}


def _filled_share(executor: Executor, mismatch: Mismatch) -> float:
    """The share of the numbers in the backbone's tensors that a loaded state has; 1 for a backbone without tensors."""
    sizes = {name: shape.numel() for name, shape in executor.shapes().items() if name.startswith(_BACKBONE)}
    left_out = {*mismatch.missing, *mismatch.reshaped}
    filled = sum(size for name, size in sizes.items() if name not in left_out)
    return filled / sum(sizes.values()) if sizes else 1.0


def _resized(executor: Executor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The positional embeddings in `weights` that are those of another grid of patches, interpolated to the model's."""
    resized = {}
    shapes = executor.shapes()
    for place, module in executor.method.named_modules():
        name = f"{place}.pos_embed"
        if not isinstance(module, VisionTransformer) or name not in weights or name not in shapes:
            continue
        if weights[name].shape == shapes[name]:
            continue
        grid, (_, places, width) = grid_of(weights[name]), shapes[name]
        if grid is not None and weights[name].shape[2] == width:
            own = module.img_size // module.patch_size
            assert places == 1 + own**2
            resized[name] = resized_positions(weights[name], own)
            logger.info(
                "%s is interpolated from %d x %d patches to %d x %d (img_size = %d)",
                *(name, grid, grid, own, own, module.img_size),
            )
    return resized


def _of_other_channels(executor: Executor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The filters of the backbone's first convolution, made for the model's number of channels, if that differs."""
    shapes = executor.shapes()
    first = next((name for name, shape in shapes.items() if name.startswith(_BACKBONE) and len(shape) == 4), None)
    if first is None or first not in weights or isinstance(executor.method.backbone, Sobel):
        return {}
    theirs, own = weights[first].shape, shapes[first]
    if len(theirs) != 4 or theirs[1] == own[1] or (theirs[0], *theirs[2:]) != (own[0], *own[2:]):
        return {}
    logger.info("%s is made for %d channels instead of %d", first, own[1], theirs[1])
    return {first: filters_of(weights[first], own[1])}


def filters_of(filters: Tensor, channels: int) -> Tensor:
    """Filters (D, C, k, k) for another number C' of channels, (D, C', k, k), whose outputs have the size of the old.

    More channels: the new ones get the mean filter, as in DINOv3's code for images of microscopes and satellites. Fewer
    channels: all get the mean filter, since none is known to be one of the old. All filters are scaled by C / C', so
    that C' equal channels give what C did.
    """
    count, mean = filters.shape[1], filters.mean(dim=1, keepdim=True)
    kept = filters if channels > count else filters[:, :0]
    added = mean.expand(-1, channels - kept.shape[1], -1, -1)
    return torch.cat([kept, added], dim=1) * (count / channels)


def _teachers_weights(method: Method, weights: Mapping[str, Tensor], progress: Progress) -> dict[str, Tensor]:
    """Weights for the momentum teachers that a file does not contain: those of their students, as in a new run."""
    names = {module: name for name, module in method.named_modules()}
    taken: dict[str, Tensor] = {}
    for teacher, student, _ in method.teachers(progress):
        if not any(name.startswith(f"{names[teacher]}.") for name in weights):
            own = {f"{names[teacher]}.{name}": f"{names[student]}.{name}" for name in student.state_dict()}
            there = {**weights, **taken}  # a teacher may have followers of its own
            taken |= {name: there[students] for name, students in own.items() if students in there}
    return taken
