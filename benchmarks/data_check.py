"""Time and memory of `sslrun data check` at two numbers of files, and from these the cost of one more file.

    python benchmarks/data_check.py [--files 2000 20000] [--rounds 3] [--workers 2]

Small images (noise of 64 pixels a side) show the cost per file, images of ImageNet's usual size that of decoding.
Rounds alternate. Memory is the peak resident size (VmHWM) of the process and of the one that decodes for it, polled
all the time. Files are in the disk's cache.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import numpy as np
from loader import write_images
from PIL import Image
from rows import append_row, quantiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs=2, default=[2000, 20000], help="numbers of small images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        few, many, large = (Path(folder) / name for name in ("few", "many", "large"))
        for images, count in zip((few, many), args.files, strict=True):
            write_small(images, count)
        large.mkdir()
        size = write_images(large, 512)
        for file in list(large.iterdir()):
            for copy in range(1, 8):
                os.link(file, large / f"{file.stem}_{copy}.jpg")
        rounds = [[measure(images, args.workers) for images in (few, many, large)] for _ in range(args.rounds)]
    names = [f"{count} JPEGs, 64x64, 4 KB" for count in args.files]
    names.append(f"4096 JPEGs, 500x375, {size / 1000:.0f} KB")
    for name, figures in zip(names, zip(*rounds, strict=True), strict=True):
        report(args, {"images": name}, figures)
    each = []
    for fewer, more, _ in rounds:
        files, wall_s, core_s = (more[key] - fewer[key] for key in ("files", "wall_s", "core_s"))
        each.append({"files_per_s": files / wall_s, "core_ms": 1e3 * core_s / files})
    report(args, {"images": f"{names[0]} to {names[1]}, each more"}, each)


def report(args: argparse.Namespace, row: dict[str, str], rounds: Sequence[dict[str, float]]) -> None:
    figures = {key: quantiles([one[key] for one in rounds]) for key in rounds[0] if key != "files"}
    append_row("data_check", {"benchmark": "data_check", **row, "workers": args.workers, **figures})
    print(f"{row['images']}: " + ", ".join(f"{key} {values['median']:.4g}" for key, values in figures.items()))


def measure(images: Path, workers: int) -> dict[str, float]:
    """One check in a separate process."""
    command = [sys.executable, str(ROOT / "bin" / "sslrun"), "data", "check", str(images), "--json"]
    before = processor_s()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([*command, "--workers", str(workers)], stdout=out, stderr=subprocess.DEVNULL)
        own, decoder = 0.0, 0.0
        while process.poll() is None:
            own = max(own, peak_mib(process.pid))
            decoder = max([decoder, *map(peak_mib, decoders(process.pid))])
            time.sleep(0.02)
        out.seek(0)
        found = json.load(out)
    assert process.returncode in (0, 1) and found["complete"], found  # the large images have copies
    return {
        "files": found["sources"][0]["images"],
        "wall_s": found["wall_s"],  # includes the start of the decoder, not of the program
        "core_s": processor_s() - before,  # of all processes of the command
        "peak_rss_mib": own,
        "decoder_peak_rss_mib": decoder,
    }


def processor_s() -> float:
    """Processor time of the child processes that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def peak_mib(process: int) -> float:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    return int(status.split("VmHWM:")[1].split()[0]) / 1024 if "VmHWM:" in status else 0.0


def decoders(process: int) -> list[int]:
    """Its child processes that decode."""
    try:
        pids = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return [int(pid) for pid in pids if b"decoding.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except OSError:
        return []


def write_small(folder: Path, count: int) -> None:
    """Different images, in 20 class folders."""
    random = np.random.default_rng(0)
    for label in range(20):
        (folder / str(label)).mkdir(parents=True)
    for number in range(count):
        coarse = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((64, 64)).save(buffer, "JPEG", quality=90)
        (folder / str(number % 20) / f"{number:06d}.jpg").write_bytes(buffer.getvalue())


if __name__ == "__main__":
    main()
