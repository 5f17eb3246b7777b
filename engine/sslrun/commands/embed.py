"""The verbs that compare images by their vectors: `embed`."""

import argparse
import sys
from typing import Any

from sslrun.commands.arguments import DONE, add_allow_imports, add_overrides
from sslrun.errors import printable


def add(verbs: Any) -> None:
    """Add the verbs' parsers."""
    embed = verbs.add_parser(
        "embed",
        help="write a vector for each image of a folder, by a trained encoder",
        description="Write the vectors of images, (N, D) float32, and the path of each image. Images are prepared as "
        "evaluations prepare them. Those of a folder are in the sorted order of their paths, those of a recipe in the "
        "order of its data.source. Where an image cannot be decoded, its row is NaN and a warning names it. After an "
        "interruption, the same command goes on; on any number of ranks the file is the same.",
    )
    _add_encoder(embed)
    embed.add_argument("images", metavar="IMAGES", help="a folder of images, or a recipe (TOML) that names some")
    embed.add_argument(
        "-o",
        dest="path",
        metavar="OUT",
        required=True,
        help="the file: .npz (arrays `vectors` and `paths`), .parquet (columns `path` and `vector`), or .npy (the "
        "paths are then in OUT.paths.txt, without .npy, one on each line)",
    )
    embed.add_argument(
        "--batch-size", type=int, default=128, metavar="N", help="images that are computed at once (128)"
    )
    embed.add_argument("--l2", action="store_true", help="scale vectors to length 1")
    embed.add_argument("--force", action="store_true", help="replace OUT")
    embed.set_defaults(call=_embed)


def _add_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, a checkpoint in one, or a file of weights")
    add_overrides(parser, "set one value of the run's recipe, such as eval.transforms; may be repeated")
    add_allow_imports(parser)
    parser.add_argument("--recipe", metavar="TOML", help="the recipe that a file of weights was trained by")


def _embed(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sslrun.embedding.embed import Settings, embed_to_file
    from sslrun.plan import device_of
    from sslrun.runtime import distributed
    from sslrun.runtime.signals import Stopped
    from sslrun.saved import open_saved

    settings, path = Settings(args.batch_size, args.l2), Path(args.path)
    saved = open_saved(Path(args.run), (), args.overrides, args.recipe and Path(args.recipe))
    device = device_of(saved.recipe, distributed.local_rank())
    try:
        done = embed_to_file(saved, device, args.images, settings, path, args.force)
    except Stopped as stopped:
        if distributed.rank() == 0:
            print(f"stopped; the same command goes on: {args.command}", file=sys.stderr)
        return stopped.exit_code
    if distributed.rank() == 0:
        print(f"{done.shape[0]} images, {done.shape[1]} numbers each", file=sys.stderr)
        print(printable(str(path)))
    return DONE
