"""Processor time per image, and images per second, of the same images in files, in tar shards and in Parquet files.

    python benchmarks/archives.py [--images 512] [--rounds 5] [--threads 2]

The images are those of benchmarks/loader.py (500 x 375 pixels, about 110 KB), in random order, and all are in memory,
so the row tells what the software costs and not the disk. `read` is reading alone, `exact` the two views of MoCo v2 in
the loader. Parquet files have groups of 100 rows, as Hugging Face writes them; they are read in order, and in random
order, where a group is not in memory already. Sides alternate; processor time does not depend on other programs. `list`
is the one-time listing of a shard with labels, per image; `pack` is `sslrun data pack` with its check, per image.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import numpy as np
import torch
from loader import mocov2, processor_s, write_images
from rows import append_row, quantiles

from sslrun.data.loader import Loader
from sslrun.data.order import Order
from sslrun.data.pack import Options, Packing
from sslrun.data.sources import Source, parquet
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.sources.web_dataset import WebDataset

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="number of threads of the loader")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SSLRUN_CACHE"] = f"{folder}/cache"
        size = 0.0
        for label in ("a", "b"):
            (Path(folder) / "files" / label).mkdir(parents=True)
            size = write_images(Path(folder) / "files" / label, args.images // 2)
        files = ImageFolder(f"{folder}/files")
        files.open()
        begin = time.process_time()
        with Packing(files, Path(folder) / "shards", Options(8_000_000), workers=2) as packing:
            packing.write(lambda _: None)
            packing.finish(packing.verify(lambda _: None))
        packed_s, begin = time.process_time() - begin, time.process_time()
        shards = WebDataset(f"{folder}/shards")
        shards.open()
        listed_s = time.process_time() - begin
        figures = measure({"files": files, "shards": shards}, args)
        figures |= of_parquet(files, Path(folder) / "rows.parquet", args)
        row = {
            "benchmark": "archives",
            "images": f"{len(files)} JPEGs, 500x375, {size / 1000:.0f} KB",
            "batch": BATCH,
            "threads": args.threads,
            "pack_core_ms": round(1e3 * packed_s / len(files), 4),
            "list_core_ms": round(1e3 * listed_s / len(files), 4),
            **{name: quantiles(values) for name, values in figures.items()},
        }
        append_row("archives", row)
        for name, values in figures.items():
            print(f"{name:28}{quantiles(values)['median']:12.4f}")
        print(f"pack {row['pack_core_ms']} ms, list {row['list_core_ms']} ms of processor time per image")


def measure(sources: dict[str, Source], args: argparse.Namespace) -> dict[str, list[float]]:
    """Of reading and of the loader, with each source."""
    count = len(next(iter(sources.values())))
    epochs, order = itertools.count(), Order(count, 0)

    def cursor() -> list[tuple[int, np.ndarray]]:
        epoch = next(epochs)
        return [(epoch, part) for part in np.array_split(np.arange(count), count // BATCH)]

    def read(source: Source) -> Iterable:
        return (source.encoded(order.ids(epoch, positions)) for epoch, positions in cursor())

    def exact(source: Source) -> Iterable:
        options = {"sampler": order, "seed": 0, "batch_size": BATCH, "num_threads": args.threads}
        return Loader(source, mocov2(), **options).run(cursor())  # type: ignore[arg-type]

    sides: dict[str, Callable[[], Iterable]] = {}
    for name, source in sources.items():
        sides |= {
            f"read_{name}": lambda source=source: read(source),
            f"exact_{name}": lambda source=source: exact(source),
        }
        for _ in exact(source):
            pass  # what is compiled, and the sizes
    return timed(sides, count, args.rounds)


def of_parquet(files: Source, path: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Of reading the same images from a Parquet file; nothing if pyarrow is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet as writer
    except ImportError:
        print("pyarrow is not installed: no Parquet")
        return {}
    images = [{"bytes": content, "path": None} for content in files.encoded(np.arange(len(files)))]
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    writer.write_table(pyarrow.table({"image": pyarrow.array(images, struct)}), path, row_group_size=100)
    del images
    source = parquet.Parquet(str(path))
    source.open()
    some = np.random.default_rng(0).permutation(len(source))[:BATCH]

    def in_order() -> Iterable:
        source._groups._kept.clear()
        return (source.encoded(part) for part in np.array_split(np.arange(len(source)), len(source) // BATCH))

    def random() -> Iterable:
        for place in range(len(some)):
            source._groups._kept.clear()  # as good as all groups of a large data set are not in memory
            yield source.encoded(some[place : place + 1])

    return {
        **timed({"read_parquet_in_order": in_order}, len(source), args.rounds),
        **timed({"read_parquet_random": random}, len(some), args.rounds),
    }


def timed(sides: dict[str, Callable[[], Iterable]], count: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of processor time per image, and images per second, of each side and round."""
    figures: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, make in sides.items():
            wall, processor = time.perf_counter(), processor_s()
            for _ in make():
                pass
            wall, processor = time.perf_counter() - wall, processor_s() - processor
            figures.setdefault(f"{name}_core_ms", []).append(1e3 * processor / count)
            figures.setdefault(f"{name}_images_per_s", []).append(count / wall)
    return figures


if __name__ == "__main__":
    main()
