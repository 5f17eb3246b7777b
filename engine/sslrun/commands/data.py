"""Verbs about pictures: `preview`."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from sslrun.commands.arguments import DONE, add_config
from sslrun.errors import UsageError


def add(verbs: Any) -> None:
    """Their parsers."""
    preview = verbs.add_parser(
        "preview",
        help="what the network will see, as a picture",
        description="The first samples of an epoch as a run of this recipe makes them, to the bit: a row for each, the "
        "original and all its views beside it.",
    )
    add_config(preview)
    preview.add_argument("-o", dest="picture", metavar="GRID.png", help="the file to write (RECIPE_preview.png)")
    preview.add_argument("--samples", type=int, default=8, metavar="N", help="how many (8)")
    preview.add_argument("--epoch", type=int, default=0, metavar="N", help="of which epoch, from 0 (0)")
    preview.add_argument("--draws", action="store_true", help="print what was drawn for every view")
    preview.add_argument("--json", action="store_true", help="print it for programs")
    preview.add_argument(
        "--against", choices=["pil"], help="show beside it what PIL makes with the same draws, and the difference"
    )
    preview.set_defaults(call=_preview)


def _preview(args: argparse.Namespace) -> int:
    from sslrun.config import load

    config = load(args.config, args.overrides)
    path = Path(args.picture if args.picture is not None else f"{config.name}_preview.png")
    _check_picture(path)
    for note in config.notes:
        print(f"note: {note}", file=sys.stderr)
    from sslrun import preview  # torch from here on

    seen = preview.look(config, args.samples, args.epoch)
    twins = preview.pil_twins_of(seen) if args.against == "pil" else None
    preview.write(preview.draw(seen, twins), path)
    described = preview.describe(seen) | {"picture": str(path)}
    if args.json:
        print(json.dumps(described, indent=2))
        return DONE
    if args.draws:
        print(preview.as_text(described))
    print(path)
    return DONE


def _check_picture(path: Path) -> None:
    """Before any work is done: can this become a picture?"""
    folder = path.parent
    if path.is_dir():
        raise UsageError(f"{path}: is a folder, not a file")
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: the picture is a PNG file; -o names one that ends with .png")
    if not folder.is_dir():
        raise UsageError(f"{path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{path}: {folder} cannot be written to")
