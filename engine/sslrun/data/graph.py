"""The first steps of each view as DALI operators, in a graph that holds no random state.

Every number comes from `view_arguments`, a pure function of seed, epoch and position, and enters the graph beside the
images as small arrays, one for each argument (slicing one packed array inside the graph costs four times as much).
`argument_names`, `graph_arguments` and `dali_views` go through groups, steps and views in the same order, which is what
tells the arrays apart. The operators are those of each transform's `dali` form, built inside a pipeline function with
`enable_conditionals=True`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sslrun import randomness
from sslrun.data.transforms import Numbers
from sslrun.data.transforms.base import chain_numbers
from sslrun.data.views import ViewGroup

Arguments = list[list[Numbers]]
"""For each view group the numbers of each of its `steps`; N = num_views * B, view-major."""


def view_arguments(
    views: Sequence[ViewGroup], seed: int, epoch: int, positions: np.ndarray, sizes: np.ndarray
) -> Arguments:
    """What to do to every view of every image of a batch; the only input of the stage and the graph besides pixels.

    Args:
        views: view groups; views are numbered through over all groups.
        seed: of the run.
        epoch: from 0.
        positions: (B,) places in the epoch of the global order.
        sizes: (B, 2) height and width of the images as decoded.
    """
    arguments: Arguments = []
    first = 0
    for group in views:
        uniforms = [
            randomness.uniforms(seed, epoch, positions, view, group.num_draws)
            for view in range(first, first + group.num_views)
        ]
        first += group.num_views
        for view, own in enumerate(uniforms):
            own[:, group.shared_draws] = uniforms[0][:, group.shared_draws]
            own[:, group.view_draws] = (view + 0.5) / group.num_views
        entering = np.tile(np.asarray(sizes), (group.num_views, 1))
        arguments.append(chain_numbers(group.transforms, np.concatenate(uniforms), entering))
    return arguments


def argument_names(views: Sequence[ViewGroup], dali_steps: Sequence[int]) -> list[list[list[str]]]:
    """The names of the arguments that each step in the graph takes: `[group][step]`.

    Args:
        views: view groups.
        dali_steps: how many of the first steps of each group are in the graph.
    """
    example = view_arguments(views, 0, 0, np.zeros(1, dtype=np.int64), np.full((1, 2), 64))
    return [
        [list(step.dali_arguments(numbers)) for step, numbers in list(zip(group.steps, own, strict=True))[:done]]
        for group, own, done in zip(views, example, dali_steps, strict=True)
    ]


def num_inputs(views: Sequence[ViewGroup], names: list[list[list[str]]]) -> int:
    """How many arrays `graph_arguments` returns, given `argument_names`."""
    return sum(
        len(own) * _branches(group, index)
        for group, steps in zip(views, names, strict=True)
        for index, own in enumerate(steps)
    )


def _branches(group: ViewGroup, index: int) -> int:
    """Number of branches of the graph that contain a step: one per view, or one if all views share the step."""
    return 1 if index < group.num_common else group.num_views


def graph_arguments(views: Sequence[ViewGroup], arguments: Arguments, dali_steps: Sequence[int]) -> list[np.ndarray]:
    """The arguments as the graph takes them, (B,) or (B, k) each: for each group, step, view and name.

    Args:
        views: view groups.
        arguments: of `view_arguments`.
        dali_steps: how many of the first steps of each group are in the graph.
    """
    result = []
    for group, numbers, done in zip(views, arguments, dali_steps, strict=True):
        for index, (step, own) in enumerate(list(zip(group.steps, numbers, strict=True))[:done]):
            values = list(step.dali_arguments(own).values())
            batch = len(own.apply) // group.num_views
            for view in range(_branches(group, index)):
                rows = slice(view * batch, (view + 1) * batch)
                result += [np.ascontiguousarray(value[rows]) for value in values]
    return result


def dali_views(images: Any, views: Sequence[ViewGroup], nodes: Sequence[Any], names: list[list[list[str]]]) -> Any:
    """Adds the steps to a pipeline.

    Args:
        images: node of decoded images, HWC uint8 RGB, on the CPU or the GPU.
        views: view groups.
        nodes: one for each array of `graph_arguments`.
        names: of `argument_names`.

    Returns:
        The nodes that `outputs_by_group` takes apart: the decoded images where a group has no step in the graph; for
        each other group one node for each view, or one for all where only steps that they have in common are done.
    """
    outputs = [images] if not all(names) else []
    first = 0
    for g in range(len(views)):
        group, branches = views[g], [images]
        for index in range(len(names[g])):
            if index == group.num_common:
                branches = branches * group.num_views
            for view in range(len(branches)):
                own = {}
                for name in names[g][index]:
                    own[name] = nodes[first]
                    first += 1
                operators: Any = group.steps[index].dali  # not None: `split.py` lets no other step through
                branches[view] = operators(branches[view], own)
        if names[g]:
            outputs += branches
    return outputs


def outputs_by_group(views: Sequence[ViewGroup], outputs: Sequence[Any], dali_steps: Sequence[int]) -> list[list[Any]]:
    """For each group its outputs of the graph: one that holds for all views, or one for each view."""
    rest = list(outputs)
    decoded = [rest.pop(0)] if not all(dali_steps) else []
    result = []
    for group, done in zip(views, dali_steps, strict=True):
        count = _branches(group, done - 1) if done else 0
        result.append(rest[:count] if done else decoded)
        rest = rest[count:]
    return result
