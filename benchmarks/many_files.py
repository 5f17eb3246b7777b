"""What a source of many files costs: first and second start, memory of each rank, time to the first batch.

    python benchmarks/many_files.py 100000                     # files are made, measured and deleted
    python benchmarks/many_files.py 100000 --before ../older   # the engine of another checkout beside this one
    python benchmarks/many_files.py 10000000 --names-only      # tables from generated names, in minutes, without files

The files are hard links to one JPEG in each folder of 1,000, so that 10^7 need 20,000 inodes. A start is one of two
processes that start at the same time, as two ranks of a node do. Figures of a start: seconds (wall clock and processor)
until names, sizes and identity are known; MiB that this adds to the process: private, mapped from files, its share
(PSS: pages that n processes map count 1/n) and the peak; the same after the first batch, and after names, sizes and
labels of 100,000 samples in random order, batch by batch. A row of `results/many_files.jsonl` for each engine has the
rank that took longer, and processor time and peak of each: at a first start one of them works and the others wait. The
first start has a terminal; the row tells which bars were drawn there. `cold_start`: the tables are not in the memory of
the operating system.

Without files, a start opens tables of that many names. Their folders exist and are looked at; so are some of the files,
which are missing in the table, too.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

PER_FOLDER = 1000
REPEATS = 3  # of the second start
RANKS = 2
DRAWN = 100_000
BATCH = 256
BARS = ("listing images", "looking at files", "reading image sizes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="number of files")
    parser.add_argument("--before", type=Path, help="another checkout, measured alternately")
    parser.add_argument("--names-only", action="store_true", help="no files: the tables are written directly")
    parser.add_argument("--folder", type=Path, help="where the files are made; default: a temporary folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--resumes", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        start(arguments.child, arguments.resumes, not arguments.names_only)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(arguments.count, Path(folder), arguments.before, arguments.names_only)


def measure(count: int, folder: Path, before: Path | None, names_only: bool) -> None:
    """Make the files, start alternately with each engine, append a row for each."""
    from rows import append_row

    here = Path(__file__).resolve().parents[1]
    engines = {"after": here} if before is None else {"before": before.resolve(), "after": here}
    load, begin = os.getloadavg()[0], time.monotonic()
    root = folder / "images"
    make(root, count, names_only)
    print(f"made in {time.monotonic() - begin:.1f} s; waiting until the folders' times are old enough", flush=True)
    time.sleep(3)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    if names_only:
        write_tables(root, count, folder / "after")
    for _ in range(REPEATS if names_only else 1 + REPEATS):
        for name, engine in engines.items():
            found[name].append(ranks(engine, root, folder / name, names_only))
            print(name, found[name][-1], flush=True)
    for name, engine in engines.items():
        row: dict[str, Any] = {"count": count, "engine": name, "has_files": not names_only, "ranks": RANKS}
        row["load"] = [load, os.getloadavg()[0]]
        again = found[name] if names_only else found[name][1:]
        if not names_only:
            row["first_start"] = found[name][0]
        row["second_start"] = sorted(again, key=lambda one: one["start_s"])[len(again) // 2]
        row |= {f"second_{key}": [one[key] for one in again] for key in ("start_s", "start_cpu_s")}
        tables = [file for file in (folder / name / "index").iterdir() if file.stat().st_size > 0]
        row["tables_mib"] = round(sum(file.stat().st_size for file in tables) / 2**20, 1)
        drop(tables)
        row["cold_start"] = ranks(engine, root, folder / name, names_only)
        if not names_only and name == "after":
            row["resume"] = ranks(engine, root, folder / name, names_only, resumes=True)
        append_row("many_files", row)
        print(json.dumps(row), flush=True)


def make(root: Path, count: int, names_only: bool) -> None:
    """Folders of 1,000 files."""
    from io import BytesIO

    import numpy as np
    from PIL import Image

    jpeg = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(jpeg, "JPEG")
    for first in range(0, count, PER_FOLDER):
        folder = root / f"n{first // PER_FOLDER:08d}"
        folder.mkdir(parents=True)
        if names_only:
            continue
        at = os.open(folder, os.O_RDONLY)
        (folder / name_of(first)).write_bytes(jpeg.getvalue())
        for i in range(first + 1, min(first + PER_FOLDER, count)):
            os.link(name_of(first), name_of(i), src_dir_fd=at, dst_dir_fd=at)
        os.close(at)


def name_of(i: int) -> str:
    """Name of a file in its folder."""
    return f"image_{i:010d}.JPEG"


def drop(files: list[Path]) -> None:
    """Take files out of the memory of the operating system."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_tables(root: Path, count: int, cache: Path) -> None:
    """The tables that a first start would write, from generated names."""
    import numpy as np

    from sslrun.data import table, waiting
    from sslrun.data.sources import file_sizes, kept
    from sslrun.data.sources.image_folder import ImageFolder
    from sslrun.data.sources.paths import Paths
    from sslrun.data.sources.seen import Seen

    os.environ["SSLRUN_CACHE"] = str(cache)
    folders = [str(root / f"n{i:08d}") for i in range(-(-count // PER_FOLDER))]
    seen = Seen()
    for folder in [str(root), *folders]:
        seen.read(folder)
    source = ImageFolder(str(root))
    source.labels, source.class_names = np.arange(count) // PER_FOLDER, [f"{i}" for i in range(len(folders))]
    paths = Paths(str(root), (f"n{i // PER_FOLDER:08d}/{name_of(i)}" for i in range(count)), seen)
    place = kept._place(source)
    assert place is not None
    place.parent.mkdir(parents=True)
    paths = kept._keep(source, paths, place, waiting.Wait())
    assert paths.kept is not None
    sizes = np.full((count, 2), 64, np.int32)
    columns = {"lengths": np.full(count, -1), "times": np.full(count, -1), "sizes": sizes}  # as of missing files
    about = {"names": paths.kept.id, "unknown": 0, "is_again": False}
    about["digest"] = file_sizes.digest_of_files(paths, columns["lengths"], sizes)
    table.write(place.with_suffix(".sizes"), columns, about)


def ranks(engine: Path, root: Path, cache: Path, names_only: bool, resumes: bool = False) -> dict[str, Any]:
    """Figures of a start of some new processes at the same time: of the one that took longest."""
    path = os.pathsep.join(str(engine / name) for name in ("engine", "kernels"))
    environment = os.environ | {"PYTHONPATH": path, "SSLRUN_CACHE": str(cache)}
    flags = [*(["--names-only"] if names_only else []), *(["--resumes"] if resumes else [])]
    command = [sys.executable, __file__, "1", "--child", str(root), *flags]
    terminal, end = os.openpty()
    drawn: list[bytes] = []
    reader = threading.Thread(target=drain, args=(terminal, drawn))
    reader.start()
    pipe = subprocess.PIPE
    children = [
        subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=end, text=True) for _ in range(RANKS)
    ]
    os.close(end)
    figures: list[dict[str, Any]] = [{} for _ in children]
    while any(child.poll() is None for child in children):  # all are at the same point when each may go on
        for child, own in zip(children, figures, strict=True):
            assert child.stdin is not None and child.stdout is not None
            own |= json.loads(child.stdout.readline() or "{}")
        for child in children:
            with contextlib.suppress(OSError):
                assert child.stdin is not None
                child.stdin.write("\n")
                child.stdin.flush()
    reader.join()
    text = b"".join(drawn).decode(errors="replace")
    if any(child.returncode for child in children):
        raise SystemExit(text)
    slowest = max(figures, key=lambda one: one["start_s"])
    each = {f"each_{key}": [one[key] for one in figures] for key in ("start_cpu_s", "start_peak_mib")}
    return slowest | each | {"bars": {bar: len(re.findall(bar, text)) for bar in BARS if bar in text}}


def drain(terminal: int, drawn: list[bytes]) -> None:
    """Read what processes write to a terminal until all have ended."""
    with contextlib.suppress(OSError):  # as a terminal ends
        while part := os.read(terminal, 1 << 16):
            drawn.append(part)
    os.close(terminal)


def start(root: str, resumes: bool, has_files: bool) -> None:
    """Open a source as a run does, read the images of a first batch, and print the figures as they come."""
    import numpy as np

    from sslrun.data.order import Order
    from sslrun.data.reading import read_all
    from sslrun.data.sources.image_folder import ImageFolder

    print("{}", flush=True)
    sys.stdin.readline()
    before = memory()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    source = ImageFolder(root)
    source.open()
    opened = time.perf_counter()
    if resumes:
        source.look_at_all()
    _ = source.sizes
    sized = time.perf_counter()
    source.identity()
    known, known_cpu = time.perf_counter(), time.process_time()
    seconds = {
        "start_s": known - begin,
        "start_cpu_s": known_cpu - begin_cpu,
        "open_s": opened - begin,
        "sizes_s": sized - opened,
        "identity_s": known - sized,
    }
    print(json.dumps({key: round(value, 3) for key, value in seconds.items()}), flush=True)
    sys.stdin.readline()
    report("start", before)
    order = Order(len(source), 0)
    if has_files:
        begin = time.perf_counter()
        read_all(source, order.ids(0, np.arange(BATCH)))
        print(json.dumps({"first_256_files_read_s": round(time.perf_counter() - begin, 3)}), flush=True)
        sys.stdin.readline()
        report("first_batch", before)
    for first in range(0, min(DRAWN, len(source)), BATCH):
        ids = order.ids(0, np.arange(first, min(first + BATCH, len(source))))
        _ = [source.names[i] for i in ids.tolist()], source.sizes_of(ids), source.labels_of(ids)
    print("{}", flush=True)
    sys.stdin.readline()
    report("drawn", before)


def report(moment: str, before: dict[str, float]) -> None:
    """Print what was added to this process's memory, while all ranks are at this point."""
    added = {f"{moment}_{key}_mib": round(value - before[key], 1) for key, value in memory().items()}
    print(json.dumps(added), flush=True)
    sys.stdin.readline()


def memory() -> dict[str, float]:
    """MiB of this process's memory: private, mapped from files, and its share of both."""
    status = Path("/proc/self/status").read_text() + Path("/proc/self/smaps_rollup").read_text()
    found = {name: int(kib) / 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE)}
    return {"private": found["RssAnon"], "mapped": found["RssFile"], "pss": found["Pss"], "peak": found["VmHWM"]}


if __name__ == "__main__":
    main()
