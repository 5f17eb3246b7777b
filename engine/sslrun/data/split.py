"""Who makes the views: which steps of each group of views are DALI operators, and which the exact stage does.

DALI does the first steps of a group, the exact stage the rest. Where the two meet depends on the mode (`data.augment`),
on the device, and on the forms that the transforms have.

What the exact stage does by blocks of images, it does in runs of steps: in compiled code, C on the CPU and Triton on a
GPU, where all steps of the run name their operations, in torch otherwise. The crop that resizes before them is C's too.
"""

import itertools
from typing import Literal

import torch

from sslrun.data import dali, native
from sslrun.data.transforms import Transform
from sslrun.data.transforms.resampling import Resampling
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError

Compiled = Literal["C", "Triton"]


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
    if augment == "dali" and group.channels != 3:
        raise UsageError(
            f'data.augment = "dali" is for RGB, and the images have {group.channels} channels (channels of the source)'
        )
    if augment == "dali":
        return leading
    geometric = next((k for k, step in enumerate(steps) if not step.geometric), len(steps))
    return max(needed, min(leading, geometric) if device.type == "cuda" and dali.is_installed() else 0)


def has_torch_form(step: Transform) -> bool:
    """Whether the exact stage can do a step."""
    return step.torch_block is not None or step.torch_image is not None


def compiled_code(device: torch.device) -> Compiled | None:
    """What does operations in the exact stage: Triton on a GPU, C on the CPU if there is a compiler, else nothing."""
    if device.type == "cuda":
        return "Triton"
    return "C" if device.type == "cpu" and native.c_functions() is not None else None


def num_image_steps(steps: list[Transform]) -> int:
    """How many of the first of some steps the exact stage does image by image: up to the last one that needs it."""
    return max((k + 1 for k, step in enumerate(steps) if step.torch_block is None), default=0)


def does_c_resize(group: ViewGroup, place: int) -> bool:
    """Whether C, where it is used, does the step at `place`, the last that is done image by image: it must resize a
    box, not the same one for all views, and C must do what comes next."""
    step, after = group.steps[place], group.steps[place + 1 :]
    is_plain = isinstance(step, Resampling) and type(step).torch_image is Resampling.torch_image
    return is_plain and place >= group.num_common and all(step.operations is not None for step in after[:1])


def paths(group: ViewGroup, augment: str, device: torch.device) -> str:
    """Which path runs for each step of a group, in one line: `DALI: RandomResizedCrop; C: ColorJitter, normalize`."""
    done = num_dali_steps(group, augment, device)
    single = done + num_image_steps(group.steps[done:])
    on_cpu = "C" if native.is_expected() else "torch"  # a plan compiles nothing
    compiled = "torch" if group.channels != 3 else "Triton" if device.type == "cuda" else on_cpu
    ways = []
    resized = single - 1 if compiled == "C" and single > done and does_c_resize(group, single - 1) else None
    for place, step in enumerate(group.steps):
        by_block = compiled if step.operations is not None else "torch"
        own = "C" if place == resized else "torch" if place < single else by_block
        ways.append(("DALI" if place < done else own, type(step).__name__))
    # Normalization belongs to the last run of a block.
    ways.append((ways[-1][0] if single < len(group.steps) else compiled, "normalize"))
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
    reasons = [f"{needs[-1]} has DALI operators only: DALI does {', '.join(ours)}"] if needs else []
    if device.type == "cuda":  # where a step in torch costs more than all others together
        in_torch, left = num_image_steps(group.steps[done:]), enumerate(group.steps[done:])
        slow = [step for place, step in left if place < in_torch or step.operations is None]
        dalis = [type(step).__name__ for step in slow if step.geometric and not dali.is_installed()]
        reasons += [f"DALI is not installed: torch does {', '.join(dalis)}, image by image"] if dalis else []
        rest = [type(step).__name__ for step in slow if type(step).__name__ not in dalis]
        if group.channels != 3:
            reasons += [f"the kernel is for RGB: torch makes images of {group.channels} channels, operator by operator"]
        reasons += [f"no kernel does {', '.join(rest)}: torch does, in a launch for each operator"] if rest else []
    return reasons
