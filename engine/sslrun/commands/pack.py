"""The verb `data pack`: images as tar shards."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslrun.commands.arguments import DONE, add_allow_imports, add_overrides, width
from sslrun.errors import UsageError

if TYPE_CHECKING:
    from sslrun.data.sources import Source

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def add(verbs: Any) -> None:
    """Add the parser of this verb to those of `data`."""
    pack = verbs.add_parser(
        "pack",
        help="write images as tar shards, which WebDataset reads",
        description="Write the images of a folder, or of a recipe's data.source, as tar shards of WebDataset's layout "
        "(IMAGE, and .cls with the number of its class), in the order of the source, so that a run computes the same "
        "from them. Each sample is read back at the end. After an interruption, the same command goes on.",
    )
    pack.add_argument("subject", metavar="SOURCE", help="a folder of images, a .parquet or .tar file, or a TOML recipe")
    pack.add_argument("folder", metavar="OUT", help="folder of the shards: new, empty, or of an interrupted packing")
    add_overrides(pack, "set one value of a recipe, as a line of TOML merged last; may be repeated")
    add_allow_imports(pack)
    pack.add_argument(
        "--shard-size", type=_bytes, default="1G", metavar="SIZE", help="size of a shard at most, such as 500M (1G)"
    )
    pack.add_argument(
        "--max-side",
        type=_between(16, 65500),
        metavar="PX",
        help="make images with a longer side into JPEGs with one of PX pixels, without metadata (all stay as they are)",
    )
    pack.add_argument("--quality", type=_between(1, 95), default=90, metavar="Q", help="quality of these JPEGs (90)")
    pack.add_argument(
        "--workers", type=_between(1, 1024), metavar="N", help="number of threads that read and encode (one per core)"
    )
    pack.set_defaults(call=_pack)


def _pack(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from sslrun.data.pack import Options, Packing

    source = _source(args.subject, args.overrides)
    options = Options(args.shard_size, args.max_side, args.quality)
    workers = args.workers or len(os.sched_getaffinity(0))
    size = {"ncols": width(), "nrows": 20}  # not every pseudo-terminal has one
    smaller = 0
    with Packing(source, Path(args.folder), options, workers) as packing:
        if packing.done:
            print(f"{args.folder}: {packing.done:,} of {len(source):,} images are there", file=sys.stderr)
        if not packing.is_finished:
            shown = {"total": len(source), "unit": " images", "disable": None, "leave": False, **size}
            with tqdm(desc="packed", initial=packing.done, **shown) as bar:
                packing.write(bar.update)
            with tqdm(desc="verified", **shown) as bar:
                smaller = packing.verify(bar.update)
            packing.finish(smaller)
    reduced = f", {smaller:,} of them made smaller" if smaller else ""
    print(f"{args.folder}: {len(source):,} images{reduced}")
    table = f'{{ _delete_ = true, type = "WebDataset", shards = {json.dumps(os.path.abspath(args.folder))} }}'
    print(f"in a recipe, [data] source = {table}", file=sys.stderr)
    return DONE


def _source(subject: str, overrides: list[str]) -> "Source":
    """The opened source that a folder, a file or a recipe names."""
    from sslrun.allowed_imports import require_allowed
    from sslrun.config import load
    from sslrun.data.sources import Source
    from sslrun.data.sources.image_folder import ImageFolder
    from sslrun.data.sources.parquet import Parquet
    from sslrun.data.sources.web_dataset import WebDataset

    files: dict[str, type[Source]] = {".parquet": Parquet, ".tar": WebDataset}
    kind = ImageFolder if os.path.isdir(subject) else files.get(os.path.splitext(subject)[1])
    if kind is not None:
        if overrides:
            raise UsageError(
                f"--set changes a recipe, but {subject} is {'a folder' if kind is ImageFolder else 'images'}"
            )
        source: Source = kind(subject)  # type: ignore[call-arg]
        try:
            source.open()
        except UsageError as error:  # without advice about keys of a recipe
            raise UsageError(str(error).rpartition(": set ")[0] or str(error)) from None
        return source
    config = load(subject, overrides)
    for note in config.notes:
        print(f"note: {note}", file=sys.stderr)
    require_allowed(config, is_for_training=True)
    if not isinstance(config.values.get("data", {}).get("source"), dict):
        raise UsageError(f"{subject} names no images: data.source is not set")
    source = config.build(Source, "data.source")
    source.open("data.source")
    return source


def _bytes(text: str) -> int:
    """A size such as 500M, 1G, 1GB or 1e9."""
    match = re.fullmatch(r"([0-9.e+]+)([kmgt]?)b?", text.strip().lower())
    if match is None or not 1e4 <= (size := float(match[1]) * _UNITS[match[2]]) < 2**62:
        raise argparse.ArgumentTypeError(f"a size is a number with k, M or G, of at least 10k, not {text!r}")
    return int(size)


def _between(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not least <= (value := int(text)) <= most:
            raise argparse.ArgumentTypeError(f"from {least} to {most}, not {value}")
        return value

    number.__name__ = "number"
    return number
