"""Tells in ten minutes what a GPU makes of sslrun: correctness, speed, memory, waits. `make gpu-check` calls it.

    python benchmarks/first_light.py [--minutes 10] [--out work_dirs/first_light] [--only PART]...
    python benchmarks/first_light.py --table    write the tables of docs/gpu.md from the rows in benchmarks/results/

The parts come in the order of their value; `--help` lists them with the longest time that each may take. Each runs in a
process of its own, which is killed if one of its items takes too long, and started again for the items that are left;
so neither a hang nor a crash ends the others. Each item's row is on the disk, in OUT/first_light.jsonl, as soon as the
item is done; what the parts print, with the tracebacks of failures, is in OUT/log.txt. A table comes last, and goes to
OUT/table.md. What is missing (DALI, DeepSpeed, pytest) is a reason to skip what needs it. It runs on a CPU too, where
it proves little.

Exit codes: 0 all items are done or skipped, 1 some failed, 2 a library without which nothing runs is missing.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
NAME, OVER = "first_light", "the time is over"
PROGRAM = ROOT / "benchmarks" / "first_light_parts.py"
NEEDED = ("numpy", "PIL", "safetensors", "tomli", "tomli_w", "torch", "triton")
PACKAGES = {"PIL": "pillow", "tomli_w": "tomli-w"}  # where they are not called as their module


@dataclass(frozen=True)
class Part:
    """A part of the whole, which runs in a process of its own.

    Attributes:
        says: what it measures, for --help.
        total_s: seconds for all items together; what is left then is skipped.
        limit_s: seconds for one item, start of the process included; then it has failed.
    """

    says: str
    total_s: float
    limit_s: float


PARTS = {
    "versions": Part("versions, the device, its matrix and copy rates", 60, 60),
    "kernel_tests": Part("the kernels' tests on the device", 110, 70),
    "step": Part("MoCo v2 at batch 256 and 32: eager, compiled, with CUDA graphs", 270, 120),
    "kernels": Part("the kernels' benchmark, without torch.compile", 70, 40),
    "views": Part("the color part of the views: time, and bits against the CPU", 45, 40),
    "methods": Part("a few steps of every other method, eager", 120, 60),
    "vit": Part("MoCo v3's ViT-S/16 on two views, eager and compiled", 90, 80),
    "training": Part("runs from the command line: decoded images, JPEGs through DALI", 120, 80),
    "other_tests": Part("all other tests that need a GPU", 60, 40),
}


def main() -> int:
    listed = "\n".join(f"  {name:14}{part.says} ({part.total_s:g} s)" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"parts:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything; what is left then is skipped")
    parser.add_argument("--out", type=Path, default=Path("work_dirs", NAME), help="folder of rows, log and table")
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help="one part; may be repeated")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="the default is cuda if there is a GPU")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # small networks, for tests of this file
    parser.add_argument("--table", action="store_true", help="only write the tables of docs/gpu.md")
    args = parser.parse_args()
    missing = [PACKAGES.get(name, name) for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {sys.executable} lacks {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    if args.table:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from first_light_table import write_tables

        write_tables()
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    return Session(args).run()


class Session:
    """One run through the parts.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.id = time.strftime("%Y-%m-%dT%H:%M:%S")
        self.begin = time.monotonic()
        self.end = self.begin + 60 * args.minutes
        self.path = args.out / f"{NAME}.jsonl"
        self.rows: list[dict[str, Any]] = []  # of this run, as far as they are printed
        self.read_bytes = self.path.stat().st_size if self.path.exists() else 0
        self.folder = Path(tempfile.mkdtemp(prefix=f"{NAME}_"))

    def run(self) -> int:
        try:
            with open(self.args.out / "log.txt", "a", encoding="utf-8") as log:
                for name in self.args.only or PARTS:
                    self._part(name, log)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from first_light_table import table

        text = "\n".join(table(self.rows))
        (self.args.out / "table.md").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}\n\n{time.monotonic() - self.begin:.0f} s; rows, table and log are in {self.args.out}")
        return 1 if any(row["status"] == "failed" for row in self.rows) else 0

    def _part(self, name: str, log: IO[str]) -> None:
        """Run a part's process until all of its items have a row."""
        end = min(self.end, time.monotonic() + PARTS[name].total_s)
        while True:
            if end - time.monotonic() < 1:
                self._append({"part": name, "item": "-", "status": "skipped", "reason": OVER})
                return
            mark = self.folder / "item"  # the child writes the name of the item that it begins
            mark.unlink(missing_ok=True)
            log.write(f"\n===== {name}, {time.strftime('%H:%M:%S')}\n")
            log.flush()
            start = os.path.getsize(log.name)
            ended = self._run_child(name, mark, log, end)
            if ended == "exit code 0":
                return
            item = mark.read_text() if mark.exists() else None
            if item is None or not any((row["part"], row["item"]) == (name, item) for row in self.rows):
                row = {"part": name, "item": item or "-"}
                if ended == OVER:
                    self._append({**row, "status": "skipped", "reason": OVER})
                else:
                    error = ended if ended.startswith("killed") else f"{ended}: {last_line(Path(log.name), start)}"
                    self._append({**row, "status": "failed", "error": error[:300]})
            if item is None or ended == OVER:  # it did not even begin, and would not the next time
                return

    def _run_child(self, name: str, mark: Path, log: IO[str], end: float) -> str:
        """Run the process of a part, at most to the limit of an item or to `end`; how it ended."""
        script = [sys.executable, str(PROGRAM), name]
        options = ["--out", str(self.args.out), "--run", self.id, "--mark", str(mark), "--folder", str(self.folder)]
        options += ["--limit", str(PARTS[name].limit_s), "--end", str(end)]
        options += ["--device", self.args.device] if self.args.device else []
        options += ["--tiny"] if self.args.tiny else []
        child = subprocess.Popen(
            [*script, *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "GOMP_SPINCOUNT": "4000"},
            start_new_session=True,  # so that what it starts can be killed with it
        )
        item, item_begin, why = "", time.monotonic(), ""
        try:
            while child.poll() is None and not why:
                time.sleep(0.1)
                self._read_rows()
                now = mark.read_text() if mark.exists() else ""
                if now != item:
                    item, item_begin = now, time.monotonic()
                if time.monotonic() > end:
                    why = OVER
                elif time.monotonic() - item_begin > PARTS[name].limit_s:
                    why = f"killed: it took longer than {PARTS[name].limit_s:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # the group also has what a child that ended left behind
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        self._read_rows()
        if why:
            return why
        return f"exit code {child.returncode}" if child.returncode >= 0 else signal.Signals(-child.returncode).name

    def _append(self, row: dict[str, Any]) -> None:
        """Append a row that no child could write; without an environment, which takes torch."""
        row = {"benchmark": NAME, "run": self.id, **row, "date": time.strftime("%Y-%m-%d")}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._read_rows()

    def _read_rows(self) -> None:
        """Read and print the whole rows that were written since."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self.read_bytes)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.read_bytes += len(whole + newline)
        for row in map(json.loads, whole.splitlines()):
            self.rows.append(row)
            what = row.get("reason") or row.get("error") or row.get("summary", "")
            print(f"{row['status']:8}{row['part']:13}{row['item']:22} {what}", flush=True)


def last_line(path: Path, start: int) -> str:
    """The last line with words that was written after a place in a file."""
    with open(path, encoding="utf-8", errors="replace") as file:
        file.seek(start)
        return next((line.strip() for line in reversed(file.read().splitlines()) if line.strip()), "")


if __name__ == "__main__":
    sys.exit(main())
