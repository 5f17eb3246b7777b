"""Who makes the views: which steps of each group of views are DALI operators, and which the exact stage does.

DALI does the first steps of a group, the exact stage the rest. Where the two meet depends on the mode (`data.augment`),
on the device, and on the forms that the transforms have.
"""

import itertools

import torch

from sslrun.data import dali, native
from sslrun.data.transforms import Transform
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError


def num_dali_steps(group: ViewGroup, augment: str, device: torch.device) -> int:
    """How many of the first steps of a group are DALI operators.

    In dali mode, all steps before the first one without DALI operators. In exact mode, no step on the CPU, and the
    leading geometric steps on a GPU where DALI is installed; more if a later step has DALI operators only.

    Raises:
        UsageError: a step without DALI operators stands before one that has nothing else.
    """
    steps = group.steps
    for step in steps:
        if step.dali is None and not has_torch_form(step):
            raise UsageError(
                f"{type(step).__name__} has no form: give it a method torch_block, torch_image or dali "
                "(docs/add-a-transform.md)"
            )
    leading = next((k for k, step in enumerate(steps) if step.dali is None), len(steps))
    needed = max((k + 1 for k, step in enumerate(steps) if not has_torch_form(step)), default=0)
    if needed > leading:
        one, other = type(steps[leading]).__name__, type(steps[needed - 1]).__name__
        raise UsageError(
            f"{one} has no DALI operators and {other} has nothing else, and DALI's steps come first: "
            f"put {other} before {one}, give {one} a method dali, or {other} a method torch_block or torch_image"
        )
    if augment == "dali":
        return leading
    geometric = next((k for k, step in enumerate(steps) if not step.geometric), len(steps))
    return max(needed, min(leading, geometric) if device.type == "cuda" and dali.is_installed() else 0)


def has_torch_form(step: Transform) -> bool:
    """Whether the exact stage can do a step."""
    return step.torch_block is not None or step.torch_image is not None


def has_c_form(step: Transform, device: torch.device) -> bool:
    """Whether `pixels.c` does a step in the exact stage, given that a block of images reaches it."""
    return step.c_operations is not None and compiles(device)


def compiles(device: torch.device) -> bool:
    """Whether the exact stage can use C on a device: on the CPU, where there is a compiler."""
    return device.type == "cpu" and native.c_functions() is not None


def num_image_steps(steps: list[Transform]) -> int:
    """How many of the first of some steps the exact stage does image by image: up to the last one that needs it."""
    return max((k + 1 for k, step in enumerate(steps) if step.torch_block is None), default=0)


def paths(group: ViewGroup, augment: str, device: torch.device) -> str:
    """Which path runs for each step of a group, in one line: `DALI: RandomResizedCrop; C: ColorJitter, normalize`."""
    done = num_dali_steps(group, augment, device)
    single = done + num_image_steps(group.steps[done:])
    ways = []
    for place, step in enumerate(group.steps):
        in_c = place >= single and has_c_form(step, device)
        ways.append(("DALI" if place < done else "C" if in_c else "torch", type(step).__name__))
    # Normalization belongs to the last run of a block.
    in_c = has_c_form(group.steps[-1], device) if single < len(group.steps) else compiles(device)
    ways.append(("C" if in_c else "torch", "normalize"))
    runs = itertools.groupby(ways, key=lambda way: way[0])
    return "; ".join(f"{way}: {', '.join(name for _, name in run)}" for way, run in runs)


def fallbacks(group: ViewGroup, augment: str, device: torch.device) -> list[str]:
    """Where a group departs from its mode because a transform lacks a form or DALI is missing, a line per reason."""
    done = num_dali_steps(group, augment, device)
    if augment == "dali":
        without = [type(step).__name__ for step in group.steps[done:] if step.dali is None]
        rest = [type(step).__name__ for step in group.steps[done:]]
        return [f"{without[0]} has no DALI operators: torch does {', '.join(rest)}"] if without else []
    needs = [type(step).__name__ for step in group.steps[:done] if not has_torch_form(step)]
    ours = [type(step).__name__ for step in group.steps[:done]]
    if needs:
        return [f"{needs[-1]} has DALI operators only: DALI does {', '.join(ours)}"]
    geometric = [type(step).__name__ for step in group.steps if step.geometric]
    if device.type == "cuda" and geometric and not dali.is_installed():
        return [f"DALI is not installed: torch does {', '.join(geometric)}, image by image"]
    return []
