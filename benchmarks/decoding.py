"""What decoding only the part of an image that its crops need could save, and what settings of the loader cost.

    python benchmarks/decoding.py [--images 128] [--rounds 7] [--dry-run]

Counted, for 4,000 images of 500 x 375 pixels and the crops of MoCo v2, SwAV and MAE: the share of the pixels that lie
in the smallest box around all crops of an image, and the share of the rows down to that box's lowest one, before which
a JPEG's codes must all be read. Rows and columns are whole blocks of 16 x 16 pixels, with one more block on each side
where there is one, from which the colors at the edge are interpolated.

Measured, alternately, on one thread: DALI's decoding of whole images (`fn.decoders.image`) and of those boxes
(`fn.decoders.image_slice`), by processor time, and how many of the pixels differ. Measured likewise: the loader with
MoCo v2's views, by threads and by batches that it prepares ahead, start and end included.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import numpy as np
from loader import write_images
from nvidia.dali import fn, pipeline_def, types
from passes import busy_s
from rows import append_row, quantiles

from sslrun.config import load
from sslrun.data.graph import view_arguments
from sslrun.data.loader import Loader
from sslrun.data.order import Order
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.session import build

RECIPES = ("mocov2", "swav", "mae")
SIZE, BLOCK = np.array([375, 500]), 16
COUNTED, BATCH = 4000, 32
SETTINGS = {f"{threads} threads, {ahead} ahead": (threads, ahead) for threads in (1, 2, 4) for ahead in (1, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="number of files")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each side; at least two")
    parser.add_argument("--dry-run", action="store_true", help="print, append no row")
    args = parser.parse_args()
    boxes = {recipe: needed(recipe, COUNTED) for recipe in RECIPES}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args.images)
        files = [np.fromfile(path, dtype=np.uint8) for path in sorted(Path(folder).iterdir())]
        begin = time.perf_counter(), busy_s(), time.process_time()
        sides: dict[str, Callable[[], Any]] = {"whole": decoder(files, None)}
        sides |= {recipe: decoder(files, boxes[recipe][: len(files)]) for recipe in RECIPES}
        whole = [image.copy() for image in sides["whole"]()]
        differing = {recipe: differing_pct(whole, sides[recipe](), boxes[recipe]) for recipe in RECIPES}
        decoding = {name: quantiles(times) for name, times in alternately(sides, args.rounds, len(files)).items()}
        settings = {name: quantiles(times) for name, times in loaders(Path(folder), args.rounds).items()}
        wall, busy, own = (
            now - then for now, then in zip((time.perf_counter(), busy_s(), time.process_time()), begin, strict=True)
        )
    row = {
        "benchmark": "decoding",
        "images": f"{args.images} JPEGs, 500x375",
        "needed_pixels_pct": {recipe: round(100 * float(shares(boxes[recipe])[0].mean()), 1) for recipe in RECIPES},
        "needed_codes_pct": {recipe: round(100 * float(shares(boxes[recipe])[1].mean()), 1) for recipe in RECIPES},
        "differing_pixels_pct": differing,
        "decoding_core_ms": decoding,
        "loader_core_ms": settings,
        "other_load": round(max(0.0, (busy - own) / wall), 2),
    }
    if not args.dry_run:
        append_row("decoding", row)
    for name in ("needed_pixels_pct", "needed_codes_pct", "differing_pixels_pct"):
        print(name, row[name])
    for name, figures in {**decoding, **settings}.items():
        print(f"{name:<24}{figures['median']:>7.3f} ms of a core per image, at least {figures['min']:.3f}")


def needed(recipe: str, count: int) -> np.ndarray:
    """(N, 4) int64: first row and column, height and width of the blocks that the crops of each image need."""
    views = build(load(str(ROOT / f"configs/{recipe}.toml"))).data.views
    arguments = view_arguments(views, 0, 0, np.arange(count), np.tile(SIZE, (count, 1)))
    crops = np.concatenate([numbers[0]["box"].reshape(-1, count, 4) for numbers in arguments]).astype(np.int64)
    first, end = crops[..., :2].min(axis=0), (crops[..., :2] + crops[..., 2:]).max(axis=0)
    first = np.maximum(first // BLOCK - 1, 0) * BLOCK
    end = np.minimum((-(-end // BLOCK) + 1) * BLOCK, SIZE)
    return np.concatenate([first, end - first], axis=1)


def shares(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of an image's pixels in its box, and of its rows down to the box's last."""
    return boxes[:, 2:].prod(axis=1) / SIZE.prod(), (boxes[:, 0] + boxes[:, 2]) / SIZE[0]


def decoder(files: list[np.ndarray], boxes: np.ndarray | None) -> Callable[[], Iterator[np.ndarray]]:
    """A function that decodes all files on one thread, whole or in their boxes; each image is valid until the next."""

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, exec_dynamic=True, prefetch_queue_depth=1)
    def graph() -> Any:
        encoded = fn.external_source(name="encoded", batch=True)
        if boxes is None:
            return fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)
        first, extent = (fn.external_source(name=name, batch=True) for name in ("first", "extent"))
        return fn.decoders.image_slice(
            encoded, first, extent, axes=[0, 1], normalized_anchor=False, normalized_shape=False,
            device="cpu", output_type=types.RGB, adjust_orientation=False,
        )  # fmt: skip

    pipeline = graph()
    pipeline.build()

    def run() -> Iterator[np.ndarray]:
        for start in range(0, len(files), BATCH):
            pipeline.feed_input("encoded", files[start : start + BATCH])
            if boxes is not None:
                own = boxes[start : start + BATCH].astype(np.float32)
                pipeline.feed_input("first", np.ascontiguousarray(own[:, :2]))
                pipeline.feed_input("extent", np.ascontiguousarray(own[:, 2:]))
            (images,) = pipeline.run()
            for place in range(len(images)):
                yield np.asarray(images[place])

    return run


def differing_pct(whole: list[np.ndarray], parts: Iterable[np.ndarray], boxes: np.ndarray) -> float:
    """Percentage of the pixels of parts, without the blocks at their edges, that are not those of the whole images."""
    differing = total = 0
    for image, part, (top, left, height, width) in zip(whole, parts, boxes.tolist(), strict=False):
        assert part.shape == (height, width, 3), f"{part.shape} is not {height} x {width}"
        rows = slice(BLOCK * (top > 0), height - BLOCK * (top + height < SIZE[0]))
        columns = slice(BLOCK * (left > 0), width - BLOCK * (left + width < SIZE[1]))
        inside = part[rows, columns] != image[top : top + height, left : left + width][rows, columns]
        differing, total = differing + int(inside.any(axis=2).sum()), total + inside[..., 0].size
    return round(100 * differing / total, 3)


def alternately(sides: dict[str, Callable[[], Any]], rounds: int, images: int) -> dict[str, list[float]]:
    """Milliseconds of processor time per image of each side, round by round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sorted(sides, reverse=number % 2 == 0):
            begin = time.process_time()
            deque(sides[name](), maxlen=0)
            times[name].append(1e3 * (time.process_time() - begin) / images)
    return times


def loaders(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of processor time per image of the loader in each of its settings."""
    views = build(load(str(ROOT / "configs/mocov2.toml"))).data.views
    source = ImageFolder(str(folder))
    source.open()
    epochs = itertools.count()
    batches = 2 * max(4, len(source) // BATCH)  # some more than are made ahead

    def once(threads: int, ahead: int) -> float:
        options: Any = {"sampler": Order(len(source), 0), "seed": 0, "batch_size": BATCH, "num_threads": threads}
        loader = Loader(source, views, augment="exact", prefetch=ahead, **options)
        epoch, positions = next(epochs), np.arange(batches * BATCH) % len(source)
        cursor = [(epoch, chunk) for chunk in positions.reshape(-1, BATCH)]
        begin = time.process_time()
        deque(loader.run(iter(cursor)), maxlen=0)
        return 1e3 * (time.process_time() - begin) / (batches * BATCH)

    times: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for number in range(rounds):
        for name in sorted(SETTINGS, reverse=number % 2 == 0):
            times[name].append(once(*SETTINGS[name]))
    return times


if __name__ == "__main__":
    main()
