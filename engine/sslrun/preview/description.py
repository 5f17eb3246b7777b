"""The draws behind the views, for people and for programs: pure functions of what went through the pipeline."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from sslrun.data.transforms import Numbers, Transform
from sslrun.data.transforms.base import Box
from sslrun.errors import printable
from sslrun.preview.samples import Samples


def describe(samples: Samples) -> dict[str, Any]:
    """Every view of every sample as plain values; names end with the unit."""
    head = {"recipe": samples.name, "seed": samples.seed, "epoch": samples.plan.epoch, "augment": samples.augment}
    return head | {"samples": [describe_sample(samples, row) for row in range(len(samples.originals))]}


def describe_sample(samples: Samples, row: int) -> dict[str, Any]:
    """One sample and its views."""
    source, sample, wanted = samples.source, int(samples.plan.ids[row]), int(samples.wanted[row])
    label = None if source.labels is None else int(source.labels[sample])
    names = source.class_names
    size = samples.originals[row].shape[:2]
    return {
        "position": int(samples.plan.positions[row]),
        "sample": sample,
        "path": source.names[sample],
        "in_place_of": None if sample == wanted else source.names[wanted],
        "label": label,
        "class": names[label] if names is not None and label is not None and 0 <= label < len(names) else None,
        "size_px": list(size),
        "views": [_view(samples, g, view, row, number) for number, (g, view) in enumerate(samples.columns, 1)],
    }


def _view(samples: Samples, g: int, view: int, row: int, number: int) -> dict[str, Any]:
    steps = samples.steps(g, view, row)
    box = part_of_original(steps, samples.originals[row].shape[:2])
    transforms = []
    for transform, numbers in steps:
        applied = bool(numbers.apply)
        values = transform.describe(numbers) if applied else {}
        transforms.append({"type": type(transform).__name__, "applied": applied, **values})
    return {
        "view": number,
        "group": f"data.views.{g}",
        "size_px": list(samples.groups[g].size),
        "part_of_original_px": None if box is None else [round(side, 2) for side in box],
        "transforms": transforms,
        "mask": _mask(samples, g, view, row),
    }


def _mask(samples: Samples, g: int, view: int, row: int) -> dict[str, Any] | None:
    hidden = samples.hidden(g, view, row)
    if hidden is None:
        return None
    return {
        "type": type(samples.groups[g].mask).__name__,
        "patches": hidden.size,
        "hidden": np.flatnonzero(hidden).tolist(),
    }


def part_of_original(steps: Sequence[tuple[Transform, Numbers]], size: tuple[int, int]) -> Box | None:
    """The part of the original that a view shows: top, left, height, width in the original's pixels; None where that is
    not an upright box.

    Args:
        steps: the view's transforms, each with its numbers.
        size: height and width of the original.
    """
    rows, columns = size
    top, left, height, width = 0.0, 0.0, float(rows), float(columns)  # a negative width: from right to left
    for transform, numbers in steps:
        if not numbers.apply:
            continue
        part = transform.part_shown(numbers, (rows, columns))
        if part is None:
            return None
        y, x, h, w = part
        top, left = top + y * height / rows, left + x * width / columns
        height, width = h * height / rows, w * width / columns
        rows, columns = numbers.size.tolist()
    return (top, left, height, width) if width >= 0 else (top, left + width, height, -width)


def as_text(described: dict[str, Any]) -> str:
    """The result of `describe` as lines of text."""
    lines = []
    for sample in described["samples"]:
        lines.append(f"position {sample['position']}: {sample_in_words(sample)}")
        for view in sample["views"]:
            lines.append(f"  view {view['view']}, {by(view['size_px'])} px, {_part(view['part_of_original_px'])}")
            for transform in view["transforms"]:
                values = {name: value for name, value in transform.items() if name not in ("type", "applied")}
                words = ", ".join(_value(*item) for item in values.items()) or "applied"
                lines.append(f"    {transform['type']:<22}{words if transform['applied'] else 'not applied'}")
            if (mask := view["mask"]) is not None:
                lines.append(f"    {mask['type']:<22}hides {len(mask['hidden'])} of {mask['patches']} patches")
    return "\n".join(lines)


def sample_in_words(sample: dict[str, Any]) -> str:
    """File, label and size of a sample, given the result of `describe_sample`, in one line."""
    words = [os.path.basename(sample["path"])]
    if sample["in_place_of"] is not None:
        words[0] += f" (in place of {os.path.basename(sample['in_place_of'])}, which is bad)"
    if sample["label"] is not None:
        words.append(f"label {sample['label']}" + (f" ({sample['class']})" if sample["class"] is not None else ""))
    return printable(", ".join([*words, f"{by(sample['size_px'])} px"]))


def by(size: Sequence[int]) -> str:
    """Height and width in words."""
    return f"{size[0]} x {size[1]}"


def _part(box: Sequence[float] | None) -> str:
    if box is None:
        return "of a part that is turned or bent"
    top, left, height, width = (f"{side:.4g}" for side in box)
    return f"of {height} x {width} px at row {top}, column {left} of the original"


def _value(name: str, value: Any) -> str:
    """A name that ends with its unit, and a value, as words: `sigma 1.2 px`."""
    words, _, unit = name.rpartition("_") if name.endswith(("_px", "_degrees")) else (name, "", "")
    is_list = isinstance(value, list)
    parts = [f"{part:.4g}" if isinstance(part, float) else str(part) for part in (value if is_list else [value])]
    return " ".join(filter(None, [words.replace("_", " "), (" x " if unit else " > ").join(parts), unit]))
