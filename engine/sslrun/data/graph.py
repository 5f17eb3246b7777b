"""The transforms of a recipe as DALI operators, in a graph that holds no random state.

Every number comes from `view_arguments`, a pure function of seed, epoch and position, and enters the graph beside the
images as small arrays, one per argument (slicing one packed array inside the graph costs four times as much). The
functions that build nodes are called inside a pipeline function with `enable_conditionals=True`.

The graph can stop early: with `part="geometry"` it makes the leading crops, resizes and flips only, and `exact.py` goes
on from there; with `part="all"` it makes the whole view (the "dali" mode).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Literal

import numpy as np

from sslrun import randomness
from sslrun.data.transforms import (
    ColorJitter,
    Crop,
    GaussianBlur,
    Parameters,
    Placing,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomRotation,
    Resample,
    Solarization,
    Transform,
)
from sslrun.data.transforms.color import BRIGHTNESS, CONTRAST, HUE, SATURATION
from sslrun.data.transforms.groups import chain_parameters
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError

Arguments = dict[str, np.ndarray]
Part = Literal["geometry", "all"]


@dataclass(frozen=True)
class Input:
    """One argument of the graph: what `external_source` must be told of it.

    Attributes:
        name: key in `graph_arguments`.
        dtype: numpy type.
        ndim: dimensions of one image's entry: 0 for a number, 1 for a vector.
    """

    name: str
    dtype: np.dtype
    ndim: int


def view_arguments(
    views: Sequence[ViewGroup], seed: int, epoch: int, positions: np.ndarray, sizes: np.ndarray
) -> Arguments:
    """What to do to every view of every image of a batch; the only thing that the stage and the graph need to know.

    Args:
        views: view groups; views are numbered through over all groups.
        seed: of the run.
        epoch: from 0.
        positions: (B,) places in the epoch of the global order.
        sizes: (B, 2) height and width of the images as decoded.

    Returns:
        For each group g, its transforms' parameters under `g.INDEX.NAME`, view-major: (num_views * B,) or
        (num_views * B, k).
    """
    arguments: Arguments = {}
    first = 0
    for g, group in enumerate(views):
        uniforms = [
            randomness.uniforms(seed, epoch, positions, view, group.num_draws)
            for view in range(first, first + group.num_views)
        ]
        first += group.num_views
        for view, own in enumerate(uniforms):
            own[:, group.shared_draws] = uniforms[0][:, group.shared_draws]
            own[:, group.view_draws] = (view + 0.5) / group.num_views
        parameters = chain_parameters(
            group.transforms, np.concatenate(uniforms), np.tile(np.asarray(sizes), (group.num_views, 1))
        )
        arguments |= {f"{g}.{name}": values for name, values in parameters.items()}
    return arguments


def numbers_of(arguments: Arguments, prefix: str) -> Parameters:
    """One transform's parameters among `view_arguments`, by their own names; `prefix` is GROUP.STEP."""
    return {name.removeprefix(prefix): values for name, values in arguments.items() if name.startswith(prefix)}


def graph_inputs(views: Sequence[ViewGroup], part: Part) -> list[Input]:
    """The arguments that the graph takes, in the order of `graph_arguments`.

    Raises:
        UsageError: the graph cannot do its part of these transforms.
    """
    for group in views:
        for _, transform in _steps(group, part):
            # Looked up here for all, since AutoGraph, which reads what follows, cannot read functools.
            if operators.dispatch(type(transform)) is operators.dispatch(object):
                raise UsageError(f'{type(transform).__name__} has no DALI operators; use data.augment = "exact"')
        late = group.steps[group.num_geometric :]
        if part == "geometry" and any(isinstance(transform, Placing) for _, transform in late):
            raise UsageError(
                'data.augment = "exact" on a GPU makes all crops, resizes and turns first: '
                'put them before the colors, or use data.augment = "dali"'
            )
    example = view_arguments(views, 0, 0, np.zeros(1, dtype=np.int64), np.full((1, 2), 64))
    return [Input(name, a.dtype, a.ndim - 1) for name, a in graph_arguments(views, example, part).items()]


def graph_arguments(views: Sequence[ViewGroup], arguments: Arguments, part: Part) -> Arguments:
    """The arguments as the graph takes them: one array (B,) or (B, k) for each number of each view.

    Args:
        views: view groups.
        arguments: what `view_arguments` returned.
        part: how far the graph goes.
    """
    result: Arguments = {}
    for g, group in enumerate(views):
        for place, (step, transform) in enumerate(_steps(group, part)):
            numbers = numbers_of(arguments, f"{g}.{step}")
            views_told = 1 if place < group.num_common else group.num_views
            for name, values in operator_arguments(transform, numbers).items():
                for view, own in enumerate(np.split(values, group.num_views)[:views_told]):
                    result[f"{g}.{view}.{step}{name}"] = np.ascontiguousarray(own)
    return result


def dali_views(images: Any, views: Sequence[ViewGroup], nodes: dict[str, Any], part: Part) -> list[Any]:
    """Adds the views to a pipeline.

    Args:
        images: node of decoded images, HWC uint8 RGB, on the CPU or the GPU.
        views: view groups.
        nodes: for each name of `graph_inputs`, the node that carries it.
        part: how far the graph goes.

    Returns:
        One node for each view, group by group: (h, w, 3) uint8 images, all of the group's size.
    """
    made = []
    for g, group in enumerate(views):
        steps = _steps(group, part)
        common = _applied(steps[: group.num_common], images, nodes, f"{g}.0.")
        made += [_applied(steps[group.num_common :], common, nodes, f"{g}.{view}.") for view in range(group.num_views)]
    return made


def _applied(steps: Sequence[tuple[str, Transform]], x: Any, nodes: dict[str, Any], prefix: str) -> Any:
    for step, transform in steps:
        first = len(prefix + step)
        own = {name[first:]: node for name, node in nodes.items() if name.startswith(prefix + step)}
        x = operators(transform, x, own)
    return x


def _steps(group: ViewGroup, part: Part) -> list[tuple[str, Transform]]:
    return group.steps[: group.num_geometric] if part == "geometry" else group.steps


@singledispatch
def operator_arguments(transform: Transform, numbers: Parameters) -> Parameters:
    """A transform's parameters, (N,) or (N, k), in the form in which its operators take them.

    The default passes all of them on; a transform of one's own may register its own form here.
    """
    return numbers


@singledispatch
def operators(transform: Transform, x: Any, numbers: dict[str, Any]) -> Any:
    """Adds a transform to a pipeline; a transform of one's own registers its function here.

    Args:
        transform: the transform.
        x: node of HWC uint8 images.
        numbers: the nodes of `operator_arguments`.

    Returns:
        Node of HWC uint8 images.
    """
    raise AssertionError("graph_inputs lets no transform through that has no operators")


def _types() -> Any:
    from nvidia.dali import types  # its constants are made at run time: no type checker finds them

    return types


# DALI rounds to nearest where PIL cuts off, so results are lowered by a little less than half a level.
_CUT = 0.499


@operator_arguments.register
def _(transform: Resample, numbers: Parameters) -> Parameters:
    top_left, height_width = numbers["box"][:, :2], numbers["box"][:, 2:]
    return {
        "start": top_left.astype(np.int32),
        "shape": height_width.astype(np.int32),
        "size": numbers["size"].astype(np.float32),
    }


@operators.register
def _(transform: Resample, x: Any, numbers: dict[str, Any]) -> Any:
    from nvidia.dali import fn

    types = _types()
    kinds = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
    # Cut first: a filter that reads beyond the box would see pixels that PIL's does not.
    crop = fn.slice(x, numbers["start"], numbers["shape"], axes=[0, 1])
    return fn.resize(crop, size=numbers["size"], interp_type=kinds[transform.interpolation], antialias=True)


@operator_arguments.register
def _(transform: Crop, numbers: Parameters) -> Parameters:
    return {"start": numbers["start"], "size": numbers["size"]}


@operators.register
def _(transform: Crop, x: Any, numbers: dict[str, Any]) -> Any:
    from nvidia.dali import fn

    return fn.slice(x, numbers["start"], numbers["size"], axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)


@operator_arguments.register
def _(transform: RandomRotation, numbers: Parameters) -> Parameters:
    return {"affine": numbers["affine"].astype(np.float32)}


@operators.register
def _(transform: RandomRotation, x: Any, numbers: dict[str, Any]) -> Any:
    from nvidia.dali import fn

    types = _types()
    matrix = fn.reshape(numbers["affine"], shape=[2, 3])  # from the result to the image: DALI's default
    return fn.warp_affine(x, matrix=matrix, interp_type=types.INTERP_NN, fill_value=0)


@operator_arguments.register
def _(transform: RandomHorizontalFlip, numbers: Parameters) -> Parameters:
    return {"apply": numbers["apply"].astype(np.int32)}


@operators.register
def _(transform: RandomHorizontalFlip, x: Any, numbers: dict[str, Any]) -> Any:
    from nvidia.dali import fn

    return fn.flip(x, horizontal=numbers["apply"])


@operator_arguments.register
def _(transform: ColorJitter, numbers: Parameters) -> Parameters:
    order = numbers["order"]
    factors = np.take_along_axis(numbers["factors"], np.maximum(order, 0), axis=1)
    slots = range(len(transform.active))
    packed = np.argsort(order < 0, axis=1, kind="stable")  # what is done comes first
    order, factors = np.take_along_axis(order, packed, axis=1), np.take_along_axis(factors, packed, axis=1)
    return {f"operation{k}": order[:, k] for k in slots} | {f"factor{k}": factors[:, k] for k in slots}


@operators.register
def _(transform: ColorJitter, x: Any, numbers: dict[str, Any]) -> Any:
    for slot in range(len(transform.active)):
        operation, factor = numbers[f"operation{slot}"], numbers[f"factor{slot}"]
        if operation == BRIGHTNESS:
            x = _brightness(x, factor)
        elif operation == CONTRAST:
            x = _contrast(x, factor)
        elif operation == SATURATION:
            x = _saturation(x, factor)
        elif operation == HUE:
            x = _hue(x, factor)
    return x


def _brightness(x: Any, factor: Any) -> Any:
    from nvidia.dali import fn

    return fn.brightness_contrast(x, brightness=factor, brightness_shift=-_CUT / 255)


def _contrast(x: Any, factor: Any) -> Any:
    from nvidia.dali import fn, math

    return _blend(x, math.floor(fn.reductions.mean(_gray(x)) + 0.5), factor)


def _saturation(x: Any, factor: Any) -> Any:
    return _blend(x, _gray(x) * 1.0, factor)


def _blend(x: Any, degenerate: Any, factor: Any) -> Any:
    # Arithmetic rather than an operator's argument, since arguments cannot come from the GPU.
    return _bytes((x - degenerate) * factor + degenerate - _CUT)


def _gray(x: Any) -> Any:
    from nvidia.dali import fn

    types = _types()
    return fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)


def _bytes(x: Any) -> Any:
    """Whole numbers from 0 to 255, by rounding; an arithmetic result has lost its layout."""
    from nvidia.dali import fn

    types = _types()
    return fn.reshape(fn.cast(x, dtype=types.UINT8), layout="HWC")


def _hue(x: Any, steps: Any) -> Any:
    """The hue turned by steps of 1/255 circle, by the arithmetic of `pixels.hue`."""
    from nvidia.dali import fn, math

    red, green, blue = (x[:, :, c : c + 1] * 1.0 for c in range(3))
    value = math.max(math.max(red, green), blue)
    chroma = value - math.min(math.min(red, green), blue)
    below = math.floor(chroma * 255.0 / math.max(value, 1.0)) * value * (1 / 65025)
    not_red, not_green = math.min(value - red, 1.0), math.min(value - green, 1.0)
    largest_green = 2.0 * chroma + blue - red
    largest_blue = 4.0 * chroma + red - green
    turn = (1.0 - not_red) * (green - blue) + not_red * ((1.0 - not_green) * largest_green + not_green * largest_blue)
    byte = math.floor(turn * 42.5 / math.max(chroma, 1.0)) - 255.0 * math.clamp(turn, -1.0, 0.0) + steps
    sector = (byte - 256.0 * math.floor(byte * (1 / 256))) * 6.0
    distances = [
        510.0 - math.abs(sector - 765.0),
        math.abs(sector - 510.0) - 255.0,
        math.abs(sector - 1020.0) - 255.0,
    ]
    return _bytes(fn.cat(*(value - math.clamp(d, 0.0, 255.0) * below for d in distances), axis=2))


@operators.register
def _(transform: RandomGrayscale, x: Any, numbers: dict[str, Any]) -> Any:
    from nvidia.dali import fn

    types = _types()
    if numbers["apply"]:
        x = fn.color_space_conversion(_gray(x), image_type=types.GRAY, output_type=types.RGB)
    return x


@operators.register
def _(transform: GaussianBlur, x: Any, numbers: dict[str, Any]) -> Any:
    from nvidia.dali import fn

    if numbers["apply"]:
        x = fn.gaussian_blur(x, sigma=numbers["sigma"])
    return x


@operators.register
def _(transform: Solarization, x: Any, numbers: dict[str, Any]) -> Any:
    from nvidia.dali import fn

    types = _types()
    table = [value if value < transform.threshold else 255 - value for value in range(256)]
    if numbers["apply"]:
        x = fn.lookup_table(x, keys=list(range(256)), values=table, dtype=types.UINT8)
    return x
