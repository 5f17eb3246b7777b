"""The transforms of a recipe as DALI operators, in a graph that holds no random state.

Every number comes from `view_arguments`, a pure function of seed, epoch and position, and enters the graph beside the
pictures as small arrays, one per argument (slicing one packed array inside the graph costs four times as much). The
functions that build nodes are called inside a pipeline function with `enable_conditionals=True`.

The graph can stop early: with `part="geometry"` it makes the leading crops, resizes and flips only, and `exact.py` goes
on from there; with `part="all"` it makes the whole view (the "dali" mode).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sslrun.data import draws
from sslrun.data.transforms import ViewGroup, chain_parameters

Arguments = dict[str, np.ndarray]
Part = Literal["geometry", "all"]


@dataclass(frozen=True)
class Input:
    """One argument of the graph: what `external_source` must be told of it.

    Attributes:
        name: key in `graph_arguments`.
        dtype: numpy type.
        ndim: dimensions of one picture's entry: 0 for a number, 1 for a vector.
    """

    name: str
    dtype: np.dtype
    ndim: int


def view_arguments(
    views: Sequence[ViewGroup], seed: int, epoch: int, positions: np.ndarray, sizes: np.ndarray
) -> Arguments:
    """What to do to every view of every picture of a batch; the only thing that the stage and the graph need to know.

    Args:
        views: view groups; views are numbered through over all groups.
        seed: of the run.
        epoch: from 0.
        positions: (B,) places in the epoch of the global order.
        sizes: (B, 2) height and width of the pictures as decoded.

    Returns:
        For each group g, its transforms' parameters under `g.INDEX.NAME`, view-major: (num_views * B,) or
        (num_views * B, k).
    """
    arguments: Arguments = {}
    first = 0
    for g, group in enumerate(views):
        uniforms = [
            draws.uniforms(seed, epoch, positions, view, group.num_draws)
            for view in range(first, first + group.num_views)
        ]
        first += group.num_views
        parameters = chain_parameters(
            group.transforms, np.concatenate(uniforms), np.tile(np.asarray(sizes), (group.num_views, 1))
        )
        arguments |= {f"{g}.{name}": values for name, values in parameters.items()}
    return arguments


def graph_inputs(views: Sequence[ViewGroup], part: Part) -> list[Input]:
    """The arguments that the graph takes, in the order of `graph_arguments`."""
    example = view_arguments(views, 0, 0, np.zeros(1, dtype=np.int64), np.full((1, 2), 64))
    return [Input(name, a.dtype, a.ndim - 1) for name, a in graph_arguments(views, example, part).items()]


def graph_arguments(views: Sequence[ViewGroup], arguments: Arguments, part: Part) -> Arguments:
    """The arguments as the graph takes them: one array (B,) or (B, k) for each number of each view.

    Args:
        views: view groups.
        arguments: what `view_arguments` returned.
        part: how far the graph goes.
    """
    raise NotImplementedError


def dali_views(images: Any, views: Sequence[ViewGroup], nodes: dict[str, Any], part: Part) -> list[Any]:
    """Adds the views to a pipeline.

    Args:
        images: node of decoded pictures, HWC uint8 RGB, on the CPU or the GPU.
        views: view groups.
        nodes: for each name of `graph_inputs`, the node that carries it.
        part: how far the graph goes.

    Returns:
        One node for each view, group by group: (h, w, 3) uint8 pictures, all of the group's size.
    """
    raise NotImplementedError
