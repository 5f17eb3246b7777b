"""What a source of many files costs: first and second start, memory of each process, time to the first batch.

    python benchmarks/many_files.py 100000                     # files are made, measured and deleted
    python benchmarks/many_files.py 100000 --before ../older   # the engine of another checkout beside this one
    python benchmarks/many_files.py 10000000 --names-only      # tables from generated names, without files

The files are hard links to one JPEG in each folder of 1,000. Each start is a process of its own. A row of
`results/many_files.jsonl` for each engine. Without files, a start is `open`, `sizes` and `identity` of a table of that
many names, whose folders exist and are looked at; so are some of the files, which are missing in the table, too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PER_FOLDER = 1000
REPEATS = 3  # of the second start


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
        print(json.dumps(start(arguments.child, arguments.resumes, not arguments.names_only)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(arguments.count, Path(folder), arguments.before, arguments.names_only)


def measure(count: int, folder: Path, before: Path | None, names_only: bool) -> None:
    """Make the files, start alternately with each engine, append a row for each."""
    from rows import append_row

    here = Path(__file__).resolve().parents[1]
    engines = {"after": here} if before is None else {"before": before.resolve(), "after": here}
    load = os.getloadavg()[0]
    begin = time.monotonic()
    root = folder / "images"
    make(root, count, names_only)
    print(f"made in {time.monotonic() - begin:.1f} s; waiting until the folders' times are old enough", flush=True)
    time.sleep(3)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    if names_only:
        write_tables(root, count, folder / "after")
    for _ in range(REPEATS if names_only else 1 + REPEATS):
        for name, engine in engines.items():
            found[name].append(child(engine, root, folder / name, names_only))
            print(name, found[name][-1], flush=True)
    for name, engine in engines.items():
        seconds = found[name] if names_only else found[name][1:]
        row: dict[str, Any] = {"count": count, "engine": name, "has_files": not names_only, "load_before": load}
        if not names_only:
            row["first_start"] = found[name][0]
        if not names_only and name == "after":
            row["resume"] = child(engine, root, folder / name, names_only, resumes=True)
        middle = sorted(seconds, key=lambda one: one["start_s"])[len(seconds) // 2]
        row["second_start"] = middle
        row |= {f"second_{key}": [one[key] for one in seconds] for key in ("start_s", "start_cpu_s")}
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
        (folder / name_of(first)).write_bytes(jpeg.getvalue())
        for i in range(first + 1, min(first + PER_FOLDER, count)):
            os.link(folder / name_of(first), folder / name_of(i))


def name_of(i: int) -> str:
    """Name of a file in its folder."""
    return f"image_{i:010d}.JPEG"


def write_tables(root: Path, count: int, cache: Path) -> None:
    """The tables that a first start would write, from generated names."""
    import numpy as np

    from sslrun.data import table
    from sslrun.data.sources import file_sizes, kept
    from sslrun.data.sources.image_folder import ImageFolder
    from sslrun.data.sources.paths import Paths

    os.environ["SSLRUN_CACHE"] = str(cache)
    folders = [str(root / f"n{i:08d}") for i in range(-(-count // PER_FOLDER))]
    seen = {folder: kept.stamp(folder) for folder in [str(root), *folders]}
    paths = Paths(str(root), (f"n{i // PER_FOLDER:08d}/{name_of(i)}" for i in range(count)), seen)
    place = kept._place(ImageFolder(str(root)))
    assert place is not None
    place.parent.mkdir(parents=True)
    columns = {"names": paths.blob, "ends": paths.ends, "labels": np.arange(count) // PER_FOLDER}
    about = {"id": "generated", "root": str(root), "class_names": [f"{i}" for i in range(len(folders))]}
    table.write(place, columns, about | {"remarks": [], "seen": seen})
    sizes = np.full((count, 2), 64, np.int32)
    columns = {"lengths": np.full(count, -1), "times": np.full(count, -1), "sizes": sizes}  # as of missing files
    about = {"names": "generated", "unknown": 0}
    about["digest"] = file_sizes.digest_of_files(paths, columns["lengths"], sizes)
    table.write(place.with_suffix(".sizes"), columns, about)


def child(engine: Path, root: Path, cache: Path, names_only: bool, resumes: bool = False) -> dict[str, Any]:
    """Figures of a start in a new process."""
    path = os.pathsep.join(str(engine / name) for name in ("engine", "kernels"))
    environment = os.environ | {"PYTHONPATH": path, "SSLRUN_CACHE": str(cache)}
    flags = [*(["--names-only"] if names_only else []), *(["--resumes"] if resumes else [])]
    command = [sys.executable, __file__, "1", "--child", str(root), *flags]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def start(root: str, resumes: bool, has_files: bool) -> dict[str, Any]:
    """Open a source as a run does, and read the images of a first batch.

    Returns:
        seconds of the parts, and MiB of memory that they add: private, and mapped from files that processes share.
    """
    import numpy as np
    import torch  # noqa: F401 - a run has it in its memory, too

    from sslrun.data.order import Order
    from sslrun.data.reading import read_all
    from sslrun.data.sources.image_folder import ImageFolder

    private, mapped = memory()
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
    if has_files:
        read_all(source, Order(len(source), 0).ids(0, np.arange(256)))
    end = time.perf_counter()
    after = memory()
    return {
        "start_s": round(known - begin, 3),
        "start_cpu_s": round(known_cpu - begin_cpu, 3),
        "open_s": round(opened - begin, 3),
        "sizes_s": round(sized - opened, 3),
        "identity_s": round(known - sized, 3),
        "first_256_files_read_s": round(end - begin, 3),
        "private_mib": round(after[0] - private, 1),
        "mapped_mib": round(after[1] - mapped, 1),
        "peak_mib": round(status("VmHWM") - private - mapped, 1),
    }


def memory() -> tuple[float, float]:
    """MiB of this process's memory: private, and mapped from files."""
    return status("RssAnon"), status("RssFile")


def status(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


if __name__ == "__main__":
    main()
