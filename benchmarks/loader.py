"""Images per second, and processor time per image, of the loader and of what one would use instead, in one run.

    python benchmarks/loader.py [CONFIG ...] [--quick] [--threads 2] [--rounds 7] [--no-peers] [--dali] [--read-ms 5]

Recipes: MoCo v2 (two views of 224 pixels), SwAV (two of 224 and six of 96, from one decode), and MAE (one of 224,
bicubic, with a mask of its patches), or those given. Images of ImageNet's usual size, 500 x 375 pixels and about
110 KB, are cut from photographs that come with scikit-learn and scikit-image. Sides:

    exact        the loader as a run uses it
    decode       DALI decodes, nothing else
    simplejpeg   one thread of simplejpeg decodes, nothing else: what libjpeg-turbo makes of a core
    pil          PIL in the workers of a DataLoader, one decode for all views (`pil_loader.py`)
    lightly      lightly's transform of the method in the workers of a DataLoader
    kornia       PIL decodes, kornia augments whole batches, in the workers of a DataLoader
    litdata      LitData's chunks of the same files and its DataLoader, with lightly's transform

The last three and simplejpeg run in processes with a Python of their own (`make peers`); those that are missing are
left out, and the row says why. SPDL is not among them: it decodes with FFmpeg's shared libraries, which pip does not
install. Each side has as many threads or workers as `--threads` says; hold the process to as many cores (`taskset -c
0,1`) where the machine has more. Rounds alternate, so that a noisy machine hits all sides; a round is about `--round-s`
seconds long. The row has quantiles of each side and of the ratios of neighbors. If other programs compete for the
cores, more threads get more of them: ratios of `core_ms`, processor time per image with that of workers, do not depend
on that. Takes about 15 minutes on idle cores, by estimate; less with `--quick`. `--read-ms` adds a side whose every
read sleeps, as on a network disk.
"""

import argparse
import functools
import io
import itertools
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import numpy as np
import torch
from passes import Pass, timed_pass
from peer import NoPeer, Peer, versions
from PIL import Image
from pil_loader import pil_loader
from rows import append_row, quantiles

from photographs import photographs
from sslrun.config import Config, load
from sslrun.data.bad_samples import BadSamples
from sslrun.data.loader import Loader
from sslrun.data.order import Order
from sslrun.data.pipeline import Pipeline
from sslrun.data.sources.base import Encoded
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.views import ViewGroup
from sslrun.session import build

RECIPES = ("configs/mocov2.toml", "configs/swav.toml", "configs/mae.toml")
LIGHTLY = {  # by the first word of a recipe's name
    "mocov1": "MoCoV1Transform",
    "mocov2": "MoCoV2Transform",
    "simclr": "SimCLRTransform",
    "byol": "BYOLTransform",
    "swav": "SwaVTransform",
    "mae": "MAETransform",
}
PEERS = ("simplejpeg", "lightly", "kornia", "litdata")
BYTES = 110_000
WARM_UP = 4  # batches before the clock starts; they use up what was made ahead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=[str(ROOT / recipe) for recipe in RECIPES])
    parser.add_argument("--quick", action="store_true", help="three rounds of a second")
    parser.add_argument(
        "--threads", type=int, default=2, help="number of threads of the loader, and of workers of others"
    )
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds of each side")
    parser.add_argument("--round-s", type=float, default=2.5, help="seconds of a round")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=512, help="number of files")
    parser.add_argument("--only", nargs="+", metavar="SIDE", help="time these sides only")
    parser.add_argument("--no-peers", action="store_true", help="leave out the sides with a Python of their own")
    parser.add_argument("--dali", action="store_true", help="time the dali mode as well")
    parser.add_argument("--read-ms", type=float, default=0.0, help="time the exact mode with reads that take longer")
    parser.add_argument("--dry-run", action="store_true", help="print, append no row")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.round_s = min(args.rounds, 3), min(args.round_s, 1.0)
    torch.set_num_threads(1)  # of the consumer; the sides set their own
    with tempfile.TemporaryDirectory() as folder:
        size = write_images(Path(folder), args.images)
        source = ImageFolder(folder)
        source.open()
        for config in args.configs:
            row = measure(source, load(config), size, args)
            if not args.dry_run:
                append_row("loader", row)
            print(f"{row['recipe']}; other load {row['other_load']['median']:.1f} cores", flush=True)
            for side, reason in row.get("left_out", {}).items():
                print(f"  {side} is left out: {reason}")
            for side, figures in row["sides"].items():
                rate, core_ms = figures["images_per_s"]["median"], figures["core_ms"]["median"]
                print(f"  {side:<12}{rate:>7.0f} images/s {core_ms:>7.2f} ms of a core per image", flush=True)


def measure(source: ImageFolder, config: Config, size: float, args: argparse.Namespace) -> dict[str, Any]:
    """A row: all sides on one recipe.

    Args:
        source: the files.
        config: the recipe, of whose data only the views matter.
        size: mean size of the files in bytes.
        args: of the command line.
    """
    views = build(config).data.views
    runs, peers, left_out = sides(source, config, views, args)
    try:
        counts: dict[str, int] = {}
        for side in list(runs):
            try:
                counts[side] = batches_for(runs[side], args)
            except NoPeer as error:
                left_out[side] = str(error)
                del runs[side]
        passes: dict[str, list[Pass]] = {side: [] for side in runs}
        for number in range(args.rounds):
            names = list(runs)
            for side in names[number % len(names) :] + names[: number % len(names)]:
                passes[side].append(runs[side](counts[side]))
    finally:
        for peer in peers:
            peer.close()
    made = sum(4 * 3 * group.num_views * math.prod(group.size) for group in views)  # bytes of float32
    figures = {side: figures_of(passes[side], counts[side] * args.batch_size, size, made) for side in runs}
    return {
        "benchmark": "loader",
        "recipe": config.name,
        "views": " + ".join(f"{group.num_views} x {group.size[0]}" for group in views),
        "images": f"{args.images} JPEGs, 500x375, {size / 1000:.0f} KB",
        "batch": args.batch_size,
        "threads": args.threads,
        **({"read_ms": args.read_ms} if args.read_ms else {}),
        "sides": figures,
        "over_exact": {side: ratios(passes, counts, side) for side in runs if side != "exact" and "exact" in runs},
        "other_load": quantiles([each.other_load for side in runs for each in passes[side]]),
        "load_average": round(os.getloadavg()[1], 1),
        **({"left_out": left_out} if left_out else {}),
        "peers": versions(),
    }


def figures_of(passes: list[Pass], images: int, read: float, made: float) -> dict[str, Any]:
    """Figures of a side: images per second, milliseconds of processor time per image, busy cores, bytes.

    Args:
        passes: its rounds.
        images: number of images in a round.
        read: bytes of a file.
        made: bytes of all views of an image.
    """
    rates = quantiles([images / each.wall_s for each in passes])
    return {
        "images_per_s": rates,
        "core_ms": quantiles([1e3 * each.core_s / images for each in passes]),
        "cores": quantiles([each.core_s / each.wall_s for each in passes]),
        "read_mb_per_s": round(rates["median"] * read / 1e6, 1),
        "made_mb_per_s": round(rates["median"] * made / 1e6, 1),
    }


def ratios(passes: dict[str, list[Pass]], counts: dict[str, int], side: str) -> dict[str, dict[str, float]]:
    """How much longer a side takes for an image than the loader, by the clock and by processor time, round by round."""
    pairs = list(zip(passes[side], passes["exact"], strict=True))
    share = counts["exact"] / counts[side]
    return {
        "wall": quantiles([share * other.wall_s / own.wall_s for other, own in pairs]),
        "core": quantiles([share * other.core_s / own.core_s for other, own in pairs]),
    }


def batches_for(run: Callable[[int], Pass], args: argparse.Namespace) -> int:
    """Number of batches of a round, the same for each worker; the first pass, which tells, also starts the workers."""
    first = 2 * args.threads
    batch_s = run(first).wall_s / first
    return args.threads * max(2, round(args.round_s / batch_s / args.threads))


def sides(
    source: ImageFolder, config: Config, views: list[ViewGroup], args: argparse.Namespace
) -> tuple[dict[str, Callable[[int], Pass]], list[Peer], dict[str, str]]:
    """A function for each side that times a number of batches; the processes of peers; and why some are left out."""
    made = {**own_sides(source, views, args), "pil": pil_side(source, views, args)}
    if args.only:
        made = {side: made[side] for side in made if side in args.only}
    peers: list[Peer] = []
    left_out: dict[str, str] = {}
    lightly = LIGHTLY.get(re.split("[_-]", config.name)[0])
    job = {
        "paths": [str(path) for path in source.names],
        "batch": args.batch_size,
        "threads": args.threads,
        "views": config.values["data"]["views"],
        "lightly": lightly,
    }
    for side in () if args.no_peers else PEERS:
        if args.only and side not in args.only:
            continue
        try:
            if lightly is None and side in ("lightly", "litdata"):
                raise NoPeer("lightly has no transform for this recipe")
            peer = Peer("loaders.py", {**job, "side": side})
        except NoPeer as error:
            left_out[side] = str(error)
            continue
        peers.append(peer)
        made[side] = functools.partial(ask, peer)
    return made, peers, left_out


def ask(peer: Peer, batches: int) -> Pass:
    """A pass of a peer's process."""
    return Pass(*peer.ask({"batches": batches + WARM_UP, "warm_up": WARM_UP}))


def own_sides(
    source: ImageFolder, views: list[ViewGroup], args: argparse.Namespace
) -> dict[str, Callable[[int], Pass]]:
    """The sides that the loader gives."""
    options: Any = {"batch_size": args.batch_size, "seed": 0, "sampler": Order(len(source), 0)}
    epochs = itertools.count()

    def cursor(batches: int) -> list[tuple[int, np.ndarray]]:
        epoch, positions = next(epochs), np.arange(batches * args.batch_size) % len(source)
        return [(epoch, chunk) for chunk in positions.reshape(batches, args.batch_size)]

    def own(augment: Any, images: ImageFolder, batches: int) -> Pass:
        loader = Loader(images, views, augment=augment, num_threads=args.threads, **options)
        return timed_pass(loader.run(cursor(batches + WARM_UP)), WARM_UP)

    def decode(batches: int) -> Pass:
        plain: Any = {"dali_steps": [0] * len(views), "num_threads": args.threads, "prefetch": 2, "bad": BadSamples()}
        pipeline = Pipeline(source, views, device=torch.device("cpu"), **plain, **options)
        return timed_pass(pipeline.run(cursor(batches + WARM_UP)), WARM_UP)

    made: dict[str, Callable[[int], Pass]] = {"exact": functools.partial(own, "exact", source), "decode": decode}
    if args.dali:
        made["dali"] = functools.partial(own, "dali", source)
    if args.read_ms:
        slow = SlowFolder(source.data_prefix)
        slow.open()
        slow.read_s = args.read_ms / 1000
        made["slow_disk"] = functools.partial(own, "exact", slow)
    return made


def pil_side(source: ImageFolder, views: list[ViewGroup], args: argparse.Namespace) -> Callable[[int], Pass]:
    """PIL in the workers of a DataLoader, which start at the first pass."""
    pil = pil_loader(list(source.names), views, args.batch_size, args.threads)
    return lambda batches: timed_pass(pil(batches + WARM_UP), WARM_UP)


class SlowFolder(ImageFolder, listed=False):
    """A folder on a disk that takes `read_s` seconds for each file."""

    read_s: float

    def encoded(self, ids: np.ndarray) -> Sequence[Encoded]:
        return [content for sample in ids for content in self._read(sample)]

    def _read(self, sample: int) -> Sequence[Encoded]:
        time.sleep(self.read_s)
        return super().encoded(np.array([sample]))


def write_images(folder: Path, count: int) -> float:
    """Write JPEGs of 500 x 375 pixels, each at the quality that comes closest to 110 KB; mean size in bytes."""
    generator = np.random.default_rng(0)
    large = [pixels for pixels in photographs() if pixels.shape[0] >= 375 and pixels.shape[1] >= 500]
    sizes = []
    for number in range(count):
        pixels = large[number % len(large)]
        top, left = (
            generator.integers(0, have - want + 1) for have, want in zip(pixels.shape, (375, 500), strict=False)
        )
        image = Image.fromarray(pixels[top : top + 375, left : left + 500])
        low, high = 80, 98
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if len(encode(image, middle)) < BYTES else (low, middle)
        file = encode(image, low)
        (folder / f"{number:05d}.jpg").write_bytes(file)
        sizes.append(len(file))
    return float(np.mean(sizes))


def encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
