"""The draws behind the views, for people and for programs: pure functions of what fed the pipeline."""

import os
from collections.abc import Sequence
from typing import Any

from sslrun.data.transforms import Crop, Parameters, RandomHorizontalFlip, Resample, Transform
from sslrun.preview.look import Look

Box = tuple[float, float, float, float]  # top, left, height, width


def describe(seen: Look) -> dict[str, Any]:
    """Every view of every sample as plain values; names end with the unit."""
    head = {"recipe": seen.name, "seed": seen.seed, "epoch": seen.plan.epoch, "augment": seen.augment}
    return head | {"samples": [describe_sample(seen, row) for row in range(len(seen.originals))]}


def describe_sample(seen: Look, row: int) -> dict[str, Any]:
    """One sample and its views."""
    source, sample, wanted = seen.source, int(seen.plan.ids[row]), int(seen.wanted[row])
    label = None if source.labels is None else int(source.labels[sample])
    names = source.class_names
    size = seen.originals[row].shape[:2]
    return {
        "position": int(seen.plan.positions[row]),
        "sample": sample,
        "path": source.names[sample],
        "in_place_of": None if sample == wanted else source.names[wanted],
        "label": label,
        "class": names[label] if names is not None and label is not None and 0 <= label < len(names) else None,
        "size_px": list(size),
        "views": [_view(seen, g, view, row, number) for number, (g, view) in enumerate(seen.columns, 1)],
    }


def _view(seen: Look, g: int, view: int, row: int, number: int) -> dict[str, Any]:
    steps = seen.steps(g, view, row)
    box = seen_part(steps, seen.originals[row].shape[:2])
    transforms = []
    for transform, numbers in steps:
        applied = bool(numbers["apply"])
        told = transform.describe(numbers) if applied else {}
        transforms.append({"type": type(transform).__name__, "applied": applied, **told})
    return {
        "view": number,
        "group": f"data.views.{g}",
        "size_px": list(seen.groups[g].size),
        "part_of_original_px": None if box is None else [round(side, 2) for side in box],
        "transforms": transforms,
    }


def seen_part(steps: Sequence[tuple[Transform, Parameters]], size: tuple[int, int]) -> Box | None:
    """The box of the original that a view shows, in the original's pixels; None where that is no upright box.

    Args:
        steps: the view's transforms, each with its numbers.
        size: height and width of the original.
    """
    rows, columns = size
    top, left, height, width = 0.0, 0.0, float(rows), float(columns)
    is_mirrored = False
    for transform, numbers in steps:
        if not transform.geometric or not numbers["apply"]:
            continue
        if isinstance(transform, RandomHorizontalFlip):
            is_mirrored = not is_mirrored
            continue
        if isinstance(transform, Resample):
            y, x, h, w = numbers["box"].tolist()
        elif isinstance(transform, Crop):
            (y, x), (h, w) = numbers["start"].tolist(), numbers["size"].tolist()
        else:
            return None
        x = columns - x - w if is_mirrored else x
        top, left = top + y * height / rows, left + x * width / columns
        height, width = h * height / rows, w * width / columns
        rows, columns = numbers["size"].tolist()
    return top, left, height, width


def as_text(described: dict[str, Any]) -> str:
    """What `describe` returned, in lines."""
    lines = []
    for sample in described["samples"]:
        lines.append(f"position {sample['position']}: {sample_in_words(sample)}")
        for view in sample["views"]:
            lines.append(f"  view {view['view']}, {by(view['size_px'])} px, {_part(view['part_of_original_px'])}")
            for transform in view["transforms"]:
                values = {name: value for name, value in transform.items() if name not in ("type", "applied")}
                told = ", ".join(_value(*item) for item in values.items()) or "applied"
                lines.append(f"    {transform['type']:<22}{told if transform['applied'] else 'not applied'}")
    return "\n".join(lines)


def sample_in_words(sample: dict[str, Any]) -> str:
    """File, label and size of what `describe_sample` returned, in one line."""
    words = [os.path.basename(sample["path"])]
    if sample["in_place_of"] is not None:
        words[0] += f" (in place of {os.path.basename(sample['in_place_of'])}, which is bad)"
    if sample["label"] is not None:
        words.append(f"label {sample['label']}" + (f" ({sample['class']})" if sample["class"] is not None else ""))
    return printable(", ".join([*words, f"{by(sample['size_px'])} px"]))


def by(size: Sequence[int]) -> str:
    """Height and width in words."""
    return f"{size[0]} x {size[1]}"


def printable(text: str) -> str:
    """A name from a file system, with a question mark for what no terminal and no font can show."""
    return "".join(c if c.isprintable() else "?" for c in os.fsencode(text).decode(errors="replace"))


def _part(box: Sequence[float] | None) -> str:
    if box is None:
        return "of a part that is turned or bent"
    top, left, height, width = (f"{side:.4g}" for side in box)
    return f"of {height} x {width} px at row {top}, column {left} of the original"


def _value(name: str, value: Any) -> str:
    """`sigma 1.2 px` of a name that ends with its unit and a value."""
    words, _, unit = name.rpartition("_") if name.endswith(("_px", "_degrees")) else (name, "", "")
    is_list = isinstance(value, list)
    parts = [f"{part:.4g}" if isinstance(part, float) else str(part) for part in (value if is_list else [value])]
    return " ".join(filter(None, [words.replace("_", " "), (" x " if unit else " > ").join(parts), unit]))
