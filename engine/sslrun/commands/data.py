"""Verbs about images: `preview`, `data check`; `data pack` is in a file of its own."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslrun.commands import pack
from sslrun.commands.arguments import (
    DONE,
    FINDINGS,
    INTERRUPTED,
    add_allow_imports,
    add_config,
    add_overrides,
    fail,
    width,
)
from sslrun.errors import UsageError, printable
from sslrun.runtime.durable import require_free

if TYPE_CHECKING:
    from sslrun.data.check import Survey
    from sslrun.data.sources import Source

# Keys of sources, and whether a source is there to be measured on.
KEYS = {"data.source": False, "data.holdout": True, "eval.train": False, "eval.test": True}


def add(verbs: Any) -> None:
    """Add the parsers of these verbs."""
    preview = verbs.add_parser(
        "preview",
        help="write an image of what the network will see",
        description="Show the first samples of an epoch as a run of this recipe makes them, bit for bit: one row per "
        "sample with the original and all its views.",
    )
    add_config(preview)
    add_allow_imports(preview)
    preview.add_argument("-o", dest="image", metavar="GRID.png", help="file to write (RECIPE_preview.png)")
    preview.add_argument("--samples", type=int, default=8, metavar="N", help="number of samples (8)")
    preview.add_argument("--epoch", type=int, default=0, metavar="N", help="number of the epoch, from 0 (0)")
    preview.add_argument("--draws", action="store_true", help="print the random draws of every view")
    preview.add_argument("--json", action="store_true", help="print the draws as JSON")
    preview.add_argument(
        "--against", choices=["pil"], help="also show what PIL makes with the same draws, and the difference"
    )
    preview.set_defaults(call=_preview)
    _add_data(verbs)


def _add_data(verbs: Any) -> None:
    data = verbs.add_parser("data", help="examine images without training on them")
    data_verbs = data.add_subparsers(required=True, metavar="VERB")
    check = data_verbs.add_parser(
        "check",
        help="decode every image; list unreadable, damaged, tiny and huge ones, and copies",
        description="Decode every image of a recipe (data.source, data.holdout, eval.train, eval.test) or of a "
        "folder, as a run would, and list those that do not decode, are damaged, tiny or huge, occur twice, or are in "
        "both a training source and a source to measure on. Exit codes: 0 nothing found, 1 findings, 130 interrupted.",
    )
    check.add_argument("subject", metavar="CONFIG|DIR", help="a TOML recipe, or a folder of images")
    add_overrides(check, "set one value of CONFIG, as a line of TOML merged last; may be repeated")
    add_allow_imports(check)
    check.add_argument(
        "-o",
        dest="good",
        metavar="GOOD.txt",
        help="write the good images of data.source, or of DIR, as an annotation file for ImageList; of equal images "
        "only the first",
    )
    check.add_argument("--force", action="store_true", help="replace GOOD.txt")
    check.add_argument(
        "--min-side",
        type=_whole(0),
        default=32,
        metavar="PX",
        help="below PX a shorter side is tiny (32)",
    )
    check.add_argument(
        "--max-pixels",
        type=_whole(1),
        default=10**8,
        metavar="N",
        help="above N pixels an image is huge (1e8)",
    )
    check.add_argument("--workers", type=_whole(1), metavar="N", help="number of threads that decode (one per core)")
    check.add_argument("--json", action="store_true", help="print all findings as JSON")
    check.set_defaults(call=_check)
    pack.add(data_verbs)


def _preview(args: argparse.Namespace) -> int:
    from sslrun.config import load

    config = load(args.config, args.overrides)
    path = Path(args.image if args.image is not None else f"{config.name}_preview.png")
    require_free(path, force=True)
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: the image is a PNG file; -o names one that ends with .png")
    for note in config.notes:
        print(f"note: {note}", file=sys.stderr)
    from sslrun import preview  # torch from here on

    samples = preview.load_samples(config, args.samples, args.epoch)
    twins = preview.pil_versions(samples) if args.against == "pil" else None
    preview.write(preview.draw(samples, twins), path)
    described = preview.describe(samples) | {"image": str(path)}
    if args.json:
        print(json.dumps(described, indent=2))
        return DONE
    if args.draws:
        print(preview.as_text(described))
    print(path)
    return DONE


def _check(args: argparse.Namespace) -> int:
    import time

    from tqdm import tqdm

    from sslrun.data.check import Limits, Verdict, examine, mark_copies
    from sslrun.data.check_report import as_json, as_text, require_listable, write_list

    surveys = _surveys(args.subject, args.overrides)
    limits = Limits(args.min_side, args.max_pixels)
    good = None if args.good is None else Path(args.good)
    if good is not None:
        require_listable(surveys[0].source)
        require_free(good, args.force)
    workers = args.workers or len(os.sched_getaffinity(0))
    total = sum(len(survey.verdicts) for survey in surveys)
    begin = time.monotonic()
    size = {"ncols": width(), "nrows": 20}  # not every pseudo-terminal has one
    with tqdm(total=total, unit=" images", disable=None, leave=False, **size) as bar:
        is_complete = examine(surveys, limits, workers, bar.update)
    mark_copies(surveys)
    elapsed_s = time.monotonic() - begin
    if args.json:
        found = {"complete": is_complete, "wall_s": round(elapsed_s, 3), "sources": as_json(surveys)}
        print(json.dumps(found, indent=1))
    else:
        print(as_text(surveys, limits))
    if not is_complete:
        unwritten = "" if good is None else f"; {good} is not written"
        return fail(f"interrupted, not all images were looked at{unwritten}", INTERRUPTED)
    print(f"{total:,} images in {elapsed_s:.1f} s, {total / elapsed_s:,.0f}/s", file=sys.stderr)
    if good is not None:
        _print_written(good, surveys[0].source, *write_list(surveys[0], good))
    return FINDINGS if any((survey.verdicts != Verdict.GOOD).any() for survey in surveys) else DONE


def _surveys(subject: str, overrides: Sequence[str]) -> "list[Survey]":
    """One survey per source of a recipe, or of a folder; two keys of one purpose and one source share it."""
    from sslrun.allowed_imports import require_allowed
    from sslrun.config import load
    from sslrun.data.check import Survey
    from sslrun.data.sources import Source
    from sslrun.data.sources.image_folder import ImageFolder

    if os.path.isdir(subject):
        if overrides:
            raise UsageError(f"--set changes a recipe, but {subject} is a folder")
        folder = ImageFolder(subject)
        try:
            folder.open()
        except UsageError as error:  # without advice about keys of a recipe
            raise UsageError(str(error).rpartition(": set ")[0] or str(error)) from None
        return [Survey(folder, [subject])]
    config = load(subject, overrides)
    for note in config.notes:
        print(f"note: {note}", file=sys.stderr)
    require_allowed(config, is_for_training=True)
    tables = {key: config.values.get(key.split(".")[0], {}).get(key.split(".")[1]) for key in KEYS}
    surveys: list[Survey] = []
    for key, is_measured in KEYS.items():
        table = tables.get(key)
        same = (s for s in surveys if s.is_measured == is_measured and tables[s.keys[0]] == table)
        if known := next(same, None):
            known.keys.append(key)
        elif isinstance(table, dict):
            source: Source = config.build(Source, key)
            source.open(key)
            surveys.append(Survey(source, [key], is_measured))
    _print_differences(surveys)
    if not surveys:
        raise UsageError(f"{subject} names no images: data.source is not set")
    return surveys


def _print_differences(surveys: "Sequence[Survey]") -> None:
    """Notes on the classes of images to measure on and of those to learn from, for a run and for evaluations."""
    from sslrun.data.classes import differences

    sources = {key: survey.source for survey in surveys for key in survey.keys}
    train, test = sources.get("data.source"), sources.get("data.holdout")
    pairs = [(train, test), (sources.get("eval.train", train), sources.get("eval.test", test))]
    notes = [text for one, other in pairs if one is not None and other is not None for text in differences(one, other)]
    for text in dict.fromkeys(notes):
        print(f"note: {text}", file=sys.stderr)


def _print_written(path: Path, source: "Source", count: int, left_out: list[str]) -> None:
    if left_out:
        print(
            f"note: {len(left_out)} good images are not in {path}: no line can hold names such as "
            f"{printable(left_out[0])}",
            file=sys.stderr,
        )
    prefix, file = json.dumps(source.files_root), json.dumps(str(path))
    table = f'{{ _delete_ = true, type = "ImageList", data_prefix = {prefix}, ann_file = {file} }}'
    print(f"{path}: {count:,} images; in a recipe, [data] source = {table}", file=sys.stderr)


def _whole(least: int) -> Callable[[str], int]:
    """Parser of an argument that is a whole number of at least `least`; 1e8 is one."""

    def number(text: str) -> int:
        value = float(text)
        if not least <= value < 2**62 or value != int(value):
            raise ValueError
        return int(value)

    number.__name__ = "number"
    return number
