"""Results of `data check` as text, as JSON, and as an annotation file of the good images for `ImageList`."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sslrun.data.check import Limits, Survey, Verdict
from sslrun.data.sources import Source
from sslrun.data.sources.subset import Subset
from sslrun.errors import UsageError, printable
from sslrun.runtime.durable import arriving

_SHOWN = 10  # entries of each kind, and of a group of copies
_QUANTILES = {"min": 0, "p5": 5, "median": 50, "p95": 95, "max": 100}


def as_json(surveys: Sequence[Survey]) -> list[dict[str, Any]]:
    """One entry per source, with every image that is not good."""
    return [_entry(survey, surveys) for survey in surveys]


def _entry(survey: Survey, surveys: Sequence[Survey]) -> dict[str, Any]:
    names = survey.source.names
    entry: dict[str, Any] = {
        "keys": survey.keys,
        "source": repr(survey.source),
        "images": len(survey.verdicts),
        "unseen": len(survey.ids(Verdict.UNSEEN)),
        "good": len(survey.ids(Verdict.GOOD)),
        "kinds": _kinds(survey.source),
        "remarks": _remarks(survey.source),
    }
    for verdict in (Verdict.UNREADABLE, Verdict.NOT_READ, Verdict.DAMAGED, Verdict.HUGE, Verdict.TINY):
        ids = survey.ids(verdict).tolist()
        entry[verdict.name.lower()] = [{"path": names[i], "reason": survey.reason(i)} for i in ids]
    entry["duplicates"] = [[names[i] for i in group] for group in _groups(survey)]
    entry["shared"] = [
        {"path": names[i], "with": other.keys, "original": other.source.names[original]}
        for i, other, original in _shared(survey, surveys)
    ]
    entry["sizes"] = _sizes(survey)
    return entry


def as_text(surveys: Sequence[Survey], limits: Limits) -> str:
    """Counts, the first images of each kind, and the distribution of sizes."""
    return "\n\n".join("\n".join(map(printable, _lines(survey, surveys, limits))) for survey in surveys)


def _lines(survey: Survey, surveys: Sequence[Survey], limits: Limits) -> Iterator[str]:
    names, labels = survey.source.names, survey.source.labels
    count, good, unseen = len(survey.verdicts), len(survey.ids(Verdict.GOOD)), len(survey.ids(Verdict.UNSEEN))
    cut = f", {unseen:,} not looked at" if unseen else ""
    yield f"{', '.join(survey.keys)}: {survey.source!r}: {count:,} images, {good:,} good{cut}"
    kinds = _kinds(survey.source)
    if len(kinds) > 1:
        yield f"  kinds of files: {', '.join(f'{count:,} {kind}' for kind, count in kinds.items())}"
    for remark in _remarks(survey.source):
        yield f"  note: {remark}"
    for verdict, meaning in {
        Verdict.UNREADABLE: "unreadable",
        Verdict.NOT_READ: "not read: the storage gave errors, which say nothing about the images",
        Verdict.DAMAGED: "damaged, though they decode",
        Verdict.HUGE: f"huge, more than {limits.max_pixels:,} pixels: not decoded",
        Verdict.TINY: f"tiny, shorter side below {limits.min_side} px",
    }.items():
        ids = survey.ids(verdict)
        yield from _listed(f"{len(ids):,} {meaning}", (f"{names[i]}: {survey.reason(i)}" for i in ids), len(ids))
    pairs = _shared(survey, surveys)
    shown = (f"{names[i]} = {other.source.names[original]}" for i, other, original in pairs)
    others = ", ".join(dict.fromkeys(key for _, other, _ in pairs for key in other.keys))
    yield from _listed(f"{len(pairs):,} are also in {others}", shown, len(pairs))
    groups = _groups(survey)
    shown = (_equal([names[i] for i in group[:_SHOWN]], len(group)) + _labels(labels, group) for group in groups)
    copies = len(survey.ids(Verdict.DUPLICATE))
    yield from _listed(f"{copies:,} duplicates, copies of {len(groups):,} others", shown, len(groups))
    sizes = _sizes(survey)
    if sizes:
        yield f"  {'pixels':13}" + "".join(f"{name:>9}" for name in _QUANTILES)
        for side, quantiles in sizes.items():
            yield f"  {side:13}" + "".join(f"{value:>9,}" for value in quantiles.values())


def _kinds(source: Source) -> dict[str, int]:
    """How many files there are with each suffix, most frequent first; empty if samples are no files."""
    if source.files_root is None:
        return {}
    counts = Counter(os.path.splitext(name)[1].lower() for name in source.names)
    return {kind or "without a suffix": count for kind, count in counts.most_common()}


def _remarks(source: Source) -> list[str]:
    """Remarks of a source and of the source that it is a part of."""
    return [*source.remarks, *(_remarks(source.source) if isinstance(source, Subset) else [])]


def _listed(heading: str, entries: Iterator[str], count: int) -> Iterator[str]:
    """A heading and the first entries below it; nothing if there are none."""
    if count:
        yield f"  {heading}"
        yield from (f"    {entry}" for entry in islice(entries, _SHOWN))
        if count > _SHOWN:
            yield f"    and {count - _SHOWN:,} more (--json lists all)"


def _equal(paths: list[str], count: int) -> str:
    return " = ".join(paths) + (f" = {count - len(paths):,} more" if count > len(paths) else "")


def _labels(labels: np.ndarray | None, group: list[int]) -> str:
    """A remark on copies with several labels, of which at most one is right."""
    distinct = [] if labels is None else np.unique(labels[group]).tolist()
    return f" with labels {', '.join(map(str, distinct))}" if len(distinct) > 1 else ""


def _groups(survey: Survey) -> list[list[int]]:
    """Groups of equal images: the good one, then its copies."""
    copies = survey.ids(Verdict.DUPLICATE)
    copies = copies[np.argsort(survey.originals[copies], kind="stable")]
    originals, starts = np.unique(survey.originals[copies], return_index=True)
    groups = np.split(copies, starts[1:]) if len(copies) else []
    return [[original, *group.tolist()] for original, group in zip(originals.tolist(), groups, strict=True)]


def _shared(survey: Survey, surveys: Sequence[Survey]) -> list[tuple[int, Survey, int]]:
    """(image, survey of the source to measure on, id of the same image there) of each shared image."""
    ids = survey.ids(Verdict.SHARED)
    owners, originals = survey.owners[ids].tolist(), survey.originals[ids].tolist()
    return [(i, surveys[k], original) for i, k, original in zip(ids.tolist(), owners, originals, strict=True)]


def _sizes(survey: Survey) -> dict[str, dict[str, int]]:
    """Quantiles of the sides of all images of known size."""
    known = survey.sizes[survey.sizes.min(axis=1) > 0]
    if len(known) == 0:
        return {}
    sides = {"height": known[:, 0], "width": known[:, 1], "shorter side": known.min(axis=1)}
    return {
        side: {name: int(np.percentile(values, q, method="nearest")) for name, q in _QUANTILES.items()}
        for side, values in sides.items()
    }


def require_listable(source: Source) -> None:
    """Raise a UsageError if no annotation file can hold the source's images."""
    if source.files_root is None:
        raise UsageError(f"the images of {source!r} are not files of their own: no annotation file can list them")
    if source.labels is not None and source.labels.min() < 0:
        raise UsageError(f"{source!r} has labels below 0, which an annotation file cannot hold")


def write_list(survey: Survey, path: Path) -> tuple[int, list[str]]:
    """Write the good images as an annotation file of lines `path label`, with paths relative to `source.files_root`.

    Returns:
        the number of images in it, and the paths that no line can hold.

    Raises:
        UsageError: the file cannot be written.
    """
    names, labels = survey.source.names, survey.source.labels
    assert survey.source.files_root is not None, "require_listable has refused it"
    below = os.path.join(survey.source.files_root, "")
    count, left_out = 0, []
    try:
        with arriving(path) as beside, open(beside, "wb") as file:
            for i in survey.ids(Verdict.GOOD).tolist():
                name = names[i].removeprefix(below) if names[i].startswith(below) else os.path.abspath(names[i])
                if not _fits(name, labels is not None):
                    left_out.append(name)
                    continue
                label = b"" if labels is None else b" %d" % labels[i]
                file.write(os.fsencode(name) + label + b"\n")
                count += 1
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    return count, left_out


def _fits(name: str, is_labeled: bool) -> bool:
    """Whether a line with this path is read back as it is: no line break, no blank at the
    end, no last word that looks like a label."""
    start, last = [*name.rsplit(None, 1), "", ""][:2]
    is_clear = is_labeled or (bool(name.strip()) and not (start and last.isdecimal()))
    return is_clear and name == name.rstrip() and not {"\n", "\r", "\0"} & set(name)
