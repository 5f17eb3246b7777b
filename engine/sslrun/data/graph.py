"""The first steps of each view as DALI operators, in a graph that holds no random state.

Every number comes from `view_arguments`, a pure function of seed, epoch and position, and enters the graph beside the
images as small arrays, one for each argument (slicing one packed array inside the graph costs four times as much).
Operators read their arguments on the host: on a GPU, no array is copied to the device.

The executor's time for each operator is what a graph costs on a GPU, so operators are few: what all views of an image
have in common is done once, and the views of a group go together, as frames of one sequence, through all steps that can
take them so. `graph_plan` says in which order and in how many branches; `graph_arguments`, `dali_views` and
`outputs_by_group` follow it: the arrays and the outputs are identified by their order. The operators are those of each
transform's `dali` form, built inside a pipeline function with `enable_conditionals=True`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sslrun import randomness
from sslrun.data.transforms import Numbers, Resize, Transform
from sslrun.data.transforms.base import chain_numbers
from sslrun.data.transforms.cropping import Cropping
from sslrun.data.views import ViewGroup

if TYPE_CHECKING:
    from torch import Tensor

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
        numbers = chain_numbers(group.transforms, np.concatenate(uniforms), entering)
        for place, (step, after) in enumerate(itertools.pairwise(group.steps)):
            if isinstance(step, Resize) and isinstance(after, Cropping):
                numbers[place : place + 2] = step.before_crop(*numbers[place : place + 2])
        arguments.append(numbers)
    return arguments


@dataclass(frozen=True)
class GraphStep:
    """One step of a view group in the graph.

    Attributes:
        place: of the step in `ViewGroup.steps`.
        step: the transform.
        branches: number of branches that it is in: one per view, or one if all views share it.
        is_frames: whether it takes the views of an image as the frames of one sequence.
        layouts: the arguments of its `dali` form by name, each with the layout of its array in the graph.
    """

    place: int
    step: Transform
    branches: int
    is_frames: bool
    layouts: dict[str, str]


@dataclass(frozen=True)
class GraphGroup:
    """What the graph does of a view group: nothing, or steps that make `num_views` views."""

    num_views: int
    steps: list[GraphStep]


Plan = list[GraphGroup]


def graph_plan(views: Sequence[ViewGroup], dali_steps: Sequence[int]) -> Plan:
    """The graph in the order in which it is built and fed.

    A flip, which DALI does view by view, comes before the steps that take frames, where it gives the same images.

    Args:
        views: view groups.
        dali_steps: how many of the first steps of each group are in the graph.
    """
    example = view_arguments(views, 0, 0, np.zeros(1, dtype=np.int64), np.full((1, 2), 64))
    plan = []
    for group, numbers, done in zip(views, example, dali_steps, strict=True):
        frames = _frames(group)
        steps: list[GraphStep] = []
        for place, step in enumerate(group.steps[:done]):
            is_frames = place in frames
            branches = 1 if is_frames or place < group.num_common else group.num_views
            arrays = step.dali_arguments(numbers[place]).items()
            layouts = {name: "F" + "*" * (array.ndim - 1) if is_frames else "" for name, array in arrays}
            before = len(steps)
            while step.is_flip and before > 0 and steps[before - 1].is_frames and steps[before - 1].step.ignores_flips:
                before -= 1
            steps.insert(before, GraphStep(place, step, branches, is_frames, layouts))
        plan.append(GraphGroup(group.num_views, steps))
    return plan


def _frames(group: ViewGroup) -> set[int]:
    """The steps that can take all views of an image at once: their images have one size, and keep it."""
    result: set[int] = set()
    place, size = 0, None
    for transform in group.transforms:
        for step in transform.steps():
            is_able = step.dali_frames and group.num_views > 1 and place >= group.num_common
            if is_able and size is not None and all(each.output_size(size) == size for each in transform.steps()):
                result.add(place)
            place += 1
        size = transform.output_size(size)
    return result


def num_inputs(plan: Plan) -> int:
    """How many arrays `graph_arguments` returns."""
    return sum(len(step.layouts) * step.branches for group in plan for step in group.steps)


def graph_arguments(plan: Plan, arguments: Arguments) -> list[np.ndarray]:
    """The arguments as the graph takes them: for each group, step, branch and name, an array with B first; then V,
    where the views are frames.

    Args:
        plan: of the graph.
        arguments: of `view_arguments`.
    """
    result = []
    for group, numbers in zip(plan, arguments, strict=True):
        for step in group.steps:
            values = step.step.dali_arguments(numbers[step.place]).values()
            by_view = [value.reshape(group.num_views, -1, *value.shape[1:]) for value in values]
            if step.is_frames:
                result += [np.ascontiguousarray(value.swapaxes(0, 1)) for value in by_view]
            else:
                result += [np.ascontiguousarray(value[view]) for view in range(step.branches) for value in by_view]
    return result


def dali_views(images: Any, plan: Plan, arguments: Callable[[], list[np.ndarray]]) -> list[Any]:
    """Adds the steps to a pipeline.

    Args:
        images: node of decoded images, HWC uint8 RGB, on the CPU or the GPU.
        plan: of the graph.
        arguments: called for each batch; returns those of `graph_arguments`.

    Returns:
        The nodes that `outputs_by_group` takes apart: the decoded images where a group has no step in the graph; for
        each other group what its last step makes.
    """
    from nvidia.dali import fn

    layouts = []
    for group in plan:
        for step in group.steps:
            layouts += list(step.layouts.values()) * step.branches
    nodes: list[Any] = []
    if layouts:
        nodes = list(fn.external_source(source=arguments, num_outputs=len(layouts), batch=True, layout=layouts))
    outputs = [] if all(group.steps for group in plan) else [images]
    for group in plan:
        made, is_stacked = [images], False
        for step in group.steps:
            made, is_stacked = _branches(made, is_stacked, step, group.num_views), step.is_frames
            operators: Any = step.step.dali  # not None: `split.py` lets no other step through
            for branch in range(step.branches):
                own = {}
                for name in step.layouts:
                    own[name] = nodes.pop(0)
                made[branch] = operators(made[branch], own)
        if group.steps:
            outputs += made
    return outputs


def _branches(made: list[Any], is_stacked: bool, step: GraphStep, num_views: int) -> list[Any]:
    """The branches that a step takes, of those that the steps before it have made."""
    from nvidia.dali import fn

    if is_stacked:
        return list(made) if step.is_frames else [made[0][view] for view in range(num_views)]
    count = num_views if step.is_frames else step.branches
    separate = made * count if len(made) == 1 else list(made)
    return [fn.stack(*separate, axis=0, axis_name="F")] if step.is_frames else separate


def outputs_by_group(plan: Plan, outputs: Sequence[list[Tensor]]) -> list[list[Tensor]]:
    """For each group its images, view-major; B if they hold for all views.

    Args:
        plan: of the graph.
        outputs: each output of the graph, as one tensor with B first, or as a list of B tensors.
    """
    rest = list(outputs)
    decoded = [] if all(group.steps for group in plan) else rest.pop(0)
    result = []
    for group in plan:
        if not group.steps:
            result.append(decoded)
        elif group.steps[-1].is_frames:
            result.append([_view_major(rest.pop(0), group.num_views)])
        else:
            result.append([image for _ in range(group.steps[-1].branches) for image in rest.pop(0)])
    return result


def _view_major(sequences: list[Tensor], num_views: int) -> Tensor:
    """(V * B, h, w, 3) of one tensor (B, V, h, w, 3) or B tensors (V, h, w, 3)."""
    import torch

    batch = sequences[0] if len(sequences) == 1 else torch.stack(sequences)
    return batch.view(-1, num_views, *batch.shape[-3:]).transpose(0, 1).flatten(0, 1)
