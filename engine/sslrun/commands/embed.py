"""The verbs about vectors of images: `embed`, `similar`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslrun.commands.arguments import DONE, add_allow_imports, add_devices, add_overrides
from sslrun.errors import UsageError, printable
from sslrun.runtime.durable import require_free

if TYPE_CHECKING:
    import torch

    from sslrun.saved import Saved

MOST_NEIGHBORS = 200


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
    embed.add_argument("images", metavar="IMAGES", help="a folder of images, an image, or a recipe (TOML)")
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

    similar = verbs.add_parser(
        "similar",
        help="show the images that are nearest to one, by a trained encoder",
        description="Find the images whose vectors have the largest cosine with that of IMAGE. Print cosines and "
        "paths, nearest first, and show the images in a PNG file, which is replaced if it exists.",
    )
    _add_encoder(similar)
    similar.add_argument("query", metavar="IMAGE", help="an image file; it is no neighbor of itself")
    similar.add_argument("images", metavar="IMAGES", help="a folder of images, or a recipe (TOML)")
    similar.add_argument("-o", dest="path", metavar="PNG", default="similar.png", help="file to write (similar.png)")
    similar.add_argument("-k", type=int, default=12, metavar="N", help="number of neighbors (12)")
    similar.set_defaults(call=_similar)


def _add_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, a checkpoint in one, or a file of weights")
    add_overrides(parser, "set one value of the run's recipe, such as eval.transforms; may be repeated")
    add_allow_imports(parser)
    add_devices(parser)
    parser.add_argument("--recipe", metavar="TOML", help="the recipe that a file of weights was trained by")


def _embed(args: argparse.Namespace) -> int:
    from sslrun.embedding.embed import Settings, embed_to_file
    from sslrun.runtime import distributed
    from sslrun.runtime.signals import Stopped

    settings, path = Settings(args.batch_size, args.l2), Path(args.path)
    saved, device = _encoder(args)
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


def _similar(args: argparse.Namespace) -> int:
    from sslrun.embedding.similar import draw, similar
    from sslrun.preview.grid import write
    from sslrun.runtime import distributed
    from sslrun.runtime.signals import Stopped

    path = Path(args.path)
    require_free(path, force=True)
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: the output is a PNG file; -o names one that ends with .png")
    if not 1 <= args.k <= MOST_NEIGHBORS:
        raise UsageError(f"-k must lie between 1 and {MOST_NEIGHBORS}, not {args.k}")
    saved, device = _encoder(args)
    try:
        found = similar(saved, device, args.query, args.images, args.k)
    except Stopped as stopped:
        return stopped.exit_code
    if distributed.rank() == 0:
        write(draw(found), path)
        for neighbor in found.neighbors:
            print(f"{neighbor.cosine:.4f}  {printable(neighbor.path)}")
        print(printable(str(path)), file=sys.stderr)
    return DONE


def _encoder(args: argparse.Namespace) -> "tuple[Saved, torch.device]":
    from sslrun.plan import device_of
    from sslrun.runtime import distributed
    from sslrun.saved import open_saved

    saved = open_saved(Path(args.run), (), args.overrides, args.recipe and Path(args.recipe))
    return saved, device_of(saved.recipe, distributed.local_rank())
