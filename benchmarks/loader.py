"""Images per second of the loader, of decoding alone and of PIL in a DataLoader, alternating in one run.

    python benchmarks/loader.py [--threads 2] [--rounds 7] [--batches 16] [--dali] [--read-ms 5]

Two recipes: MoCo v2 (two views of 224 pixels) and SwAV (two of 224, six of 96, all from one decode). Images of
ImageNet's usual size, 500 x 375 pixels and about 110 KB, are cut from photographs that come with scikit-learn and
scikit-image. Both sides get as many threads or workers as `--threads` says; hold the process to as many cores
(`taskset -c 0,1`) where the machine has more. Rounds alternate, so that a noisy machine hits all sides; the row has the
quantiles of each and of the ratios of neighbors. If other programs compete for the cores, more threads get more of
them: `core_ms`, processor time for each image with that of the workers, does not depend on it. `--read-ms` adds a side
whose every read sleeps, as a network disk does.
"""

import argparse
import io
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import numpy as np
import torch
from PIL import Image
from pil_loader import pil_loader
from rows import append_row, quantiles

from photographs import photographs
from sslrun.data.bad_samples import BadSamples
from sslrun.data.loader import Loader
from sslrun.data.order import Order
from sslrun.data.pipeline import Pipeline
from sslrun.data.sources.base import Encoded
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.transforms import (
    ColorJitter,
    GaussianBlur,
    Normalize,
    RandomAppliedTrans,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
)
from sslrun.data.views import ViewGroup

BYTES = 110_000
WARM_UP = 4  # batches before the clock starts; they use up what was made ahead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="number of threads of the loader, and of workers of PIL")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds of each side")
    parser.add_argument("--batches", type=int, default=16, help="number of timed batches per round")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=512, help="number of files")
    parser.add_argument("--dali", action="store_true", help="time the dali mode as well")
    parser.add_argument("--read-ms", type=float, default=0.0, help="time the exact mode with reads that take longer")
    args = parser.parse_args()
    torch.set_num_threads(1)  # of the consumer; the sides set their own
    with tempfile.TemporaryDirectory() as folder:
        size = write_images(Path(folder), args.images)
        source = ImageFolder(folder)
        source.open()
        for name, views in {"mocov2 2x224": mocov2(), "swav 2x224+6x96": swav()}.items():
            rates, core_ms = measure(source, views, args)
            ratio = [own / pil for own, pil in zip(rates["exact"], rates["pil"], strict=True)]
            core_ratio = [pil / own for own, pil in zip(core_ms["exact"], core_ms["pil"], strict=True)]
            row = {
                "benchmark": "loader",
                "recipe": name,
                "images": f"{args.images} JPEGs, 500x375, {size / 1000:.0f} KB",
                "batch": args.batch_size,
                "threads": args.threads,
                **({"read_ms": args.read_ms} if args.read_ms else {}),
                **{f"{side}_images_per_s": quantiles(values) for side, values in rates.items()},
                "exact_over_pil": quantiles(ratio),
                **{f"{side}_core_ms": quantiles(values) for side, values in core_ms.items()},
                "exact_over_pil_core": quantiles(core_ratio),
            }
            append_row("loader", row)
            medians = ", ".join(f"{side} {quantiles(values)['median']:.0f}" for side, values in rates.items())
            print(
                f"{name}: {medians} images/s; exact over PIL {row['exact_over_pil']['median']:.2f}, "
                f"by processor time {row['exact_over_pil_core']['median']:.2f}"
            )


class SlowFolder(ImageFolder, listed=False):
    """A folder on a disk that takes `read_s` seconds for each file."""

    read_s: float

    def encoded(self, ids: np.ndarray) -> Sequence[Encoded]:
        return [content for sample in ids for content in self._read(sample)]

    def _read(self, sample: int) -> Sequence[Encoded]:
        time.sleep(self.read_s)
        return super().encoded(np.array([sample]))


def measure(
    source: ImageFolder, views: list[ViewGroup], args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Images per second, and milliseconds of processor time per image, of each side and round."""
    batches = args.batches + WARM_UP
    options = {"batch_size": args.batch_size, "seed": 0, "sampler": Order(len(source), 0)}
    pil = pil_loader(list(source.names), views, args.batch_size, batches, args.threads)
    epochs = itertools.count()

    def cursor() -> list[tuple[int, np.ndarray]]:
        epoch, positions = next(epochs), np.arange(batches * args.batch_size) % len(source)
        return [(epoch, chunk) for chunk in positions.reshape(batches, args.batch_size)]

    def own(augment: str, images: ImageFolder = source) -> Iterable:
        return Loader(images, views, augment=augment, num_threads=args.threads, **options).run(cursor())  # type: ignore[arg-type]

    def decode() -> Iterable:
        plain = {"dali_steps": [0] * len(views), "num_threads": args.threads, "prefetch": 2, "bad": BadSamples()}
        return Pipeline(source, views, device=torch.device("cpu"), **plain, **options).run(cursor())  # type: ignore[arg-type]

    sides: dict[str, Callable[[], Iterable]] = {"exact": lambda: own("exact"), "pil": lambda: pil, "decode": decode}
    if args.dali:
        sides["dali"] = lambda: own("dali")
    if args.read_ms:
        slow = SlowFolder(source.data_prefix)
        slow.open()
        slow.read_s = args.read_ms / 1000
        sides["slow_disk"] = lambda: own("exact", slow)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    core_ms: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, make in sides.items():
            times = [(time.perf_counter(), processor_s()) for _ in make()]
            wall, processor = (last - first for first, last in zip(times[WARM_UP - 1], times[-1], strict=True))
            rates[side].append(args.batches * args.batch_size / wall)
            core_ms[side].append(1e3 * processor / (args.batches * args.batch_size))
    return rates, core_ms


def processor_s() -> float:
    """Processor time of this process and its workers."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def mocov2() -> list[ViewGroup]:
    """Views of configs/mocov2.toml."""
    return [
        ViewGroup(
            2,
            [
                RandomResizedCrop(224, scale=(0.2, 1.0)),
                ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
                RandomGrayscale(p=0.2),
                GaussianBlur(0.1, 2.0, p=0.5),
                RandomHorizontalFlip(p=0.5),
                Normalize(),
            ],
        )
    ]


def swav() -> list[ViewGroup]:
    """Views of SwAV's multi-crop recipe."""

    def group(num_views: int, size: int, scale: tuple[float, float]) -> ViewGroup:
        colors = [RandomAppliedTrans([ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8), RandomGrayscale(p=0.2)]
        head = [RandomResizedCrop(size, scale=scale), RandomHorizontalFlip(p=0.5)]
        return ViewGroup(num_views, [*head, *colors, GaussianBlur(0.1, 2.0, p=0.5), Normalize()])

    return [group(2, 224, (0.14, 1.0)), group(6, 96, (0.05, 0.14))]


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
