"""How the runs below a folder stand, told from their files; nothing in them is touched, and nothing here needs torch.

What is damaged or missing leaves a gap, never an error.
"""

import fcntl
import json
import math
import os
import re
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import tomli

from sslrun.errors import printable

_STATES = ("running", "done", "pre-empted", "failed", "interrupted")
_KNN = re.compile(rb'"knn/top1_pct"\s*:\s*([-+.\deE]+)\s*(?=[,}])')
_BLOCK = 2**20  # read at once, of all
_FIRST = 2**14  # read at once, from the end
_SHORTEST_NAME = 16


@dataclass(frozen=True)
class Run:
    """A run folder. None stands for what is not known.

    Attributes:
        path: the folder.
        state: running, done, pre-empted, failed, interrupted; "died" is a run that is over and could not say so.
        exit_code: of the process.
        error: what it failed of.
        step: optimizer steps done, at the last row of metrics.jsonl.
        epoch: the same in epochs.
        epochs: length of the run.
        loss: last one written; NaN where it was not finite.
        best_knn_top1_pct: of the rows of metrics.jsonl.
        images_per_s: last one written.
        age_s: seconds since the last row.
        evaluations: best accuracy of each kind of `sslrun eval`, such as "linear/top1_pct".
    """

    path: Path
    state: str | None = None
    exit_code: int | None = None
    error: str | None = None
    step: int | None = None
    epoch: float | None = None
    epochs: float | None = None
    loss: float | None = None
    best_knn_top1_pct: float | None = None
    images_per_s: float | None = None
    age_s: float | None = None
    evaluations: dict[str, float] = field(default_factory=dict)


def find_runs(root: Path) -> Iterator[Run]:
    """The runs in a folder and below it, by name. Links are followed, once; runs hold no runs."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        if {"state.json", "metrics.jsonl"} & set(files) or ("config.toml" in files and "checkpoints" in folders):
            folders.clear()
            yield read_run(Path(folder))
        folders[:] = sorted(name for name in folders if name != "checkpoints" and not name.startswith("."))


def read_run(path: Path) -> Run:
    """What a run folder tells."""
    record, config = _json(path / "state.json"), _toml(path / "config.toml")
    last, training = _last_rows(path / "metrics.jsonl")
    step, epoch = _number(last.get("step")), _number(last.get("epoch"))
    epochs, steps = _number(config.get("epochs")), _number(config.get("max_iters"))
    if epochs is None and steps is not None and step and epoch:
        epochs = steps * epoch / step
    exit_code, error = record.get("exit_code"), record.get("error")
    return Run(
        path=path,
        state=_state(path, record),
        exit_code=exit_code if isinstance(exit_code, int) else None,
        error=error if isinstance(error, str) else None,
        step=None if step is None else int(step),
        epoch=epoch,
        epochs=epochs,
        loss=math.nan if training.get("train/loss", 0) is None else _number(training.get("train/loss")),
        best_knn_top1_pct=_best_knn(path / "metrics.jsonl"),
        images_per_s=_number(training.get("speed/images_per_s")),
        age_s=_age_s(path / "metrics.jsonl") if last else None,
        evaluations=_evaluations(path / "eval"),
    )


def as_json(runs: Sequence[Run]) -> str:
    """A list of tables; a loss that was not finite is null."""
    tables = [{**vars(run), "path": str(run.path), "loss": _number(run.loss)} for run in runs]
    return json.dumps(tables, indent=1)


def as_table(runs: Sequence[Run], root: Path, width: int) -> str:
    """A line for each run. Where the width does not suffice, names are shortened, then columns left out."""
    columns = {
        "run": [
            printable(os.path.relpath(run.path, root) if run.path != root else root.resolve().name) for run in runs
        ],
        "state": [f"{run.state or '?'}{f' ({run.exit_code})' if run.state == 'failed' else ''}" for run in runs],
        "epoch": [_of_total(run) for run in runs],
        "loss": [_text(run.loss, ".4f") for run in runs],
        "k-NN %": [_text(run.best_knn_top1_pct, ".1f") for run in runs],
        "images/s": [_text(run.images_per_s, ".0f") for run in runs],
        "last row": ["" if run.age_s is None else _ago(run.age_s) for run in runs],
    }
    sizes = {name: max(map(len, [name, *entries])) for name, entries in columns.items()}
    for name in ("images/s", "last row", "loss", "k-NN %", "epoch", "state"):
        free = width - sum(size + 2 for other, size in sizes.items() if other != "run")
        if free >= min(sizes["run"], _SHORTEST_NAME):
            break
        del columns[name], sizes[name]
    sizes["run"] = max(1, min(sizes["run"], width - sum(size + 2 for name, size in sizes.items() if name != "run")))
    columns["run"] = [_shortened(name, sizes["run"]) for name in columns["run"]]
    lines = [list(columns), *zip(*columns.values(), strict=True)]
    aligns = [str.ljust if name in ("run", "state") else str.rjust for name in columns]
    return "\n".join(
        "  ".join(align(cell, size) for align, cell, size in zip(aligns, line, sizes.values(), strict=True)).rstrip()
        for line in lines
    )


def _state(path: Path, record: dict[str, Any]) -> str | None:
    state = record.get("state")
    if state not in _STATES:
        return None
    return "died" if state == "running" and not _is_alive(path, record) else state


def _is_alive(path: Path, record: dict[str, Any]) -> bool:
    """Whether a process has the folder: by its lock, else by the process's number; in doubt it has."""
    pid, is_here = record.get("pid"), record.get("host") == socket.gethostname()
    if is_here and pid == os.getpid():  # to close the lock's file would let go of the lock
        return True
    try:
        descriptor = os.open(path / ".lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # struct flock: any lock on any part of the file; only asked for, not taken, so that no start is disturbed
            question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_ = struct.unpack("hhqqi4x", fcntl.fcntl(descriptor, fcntl.F_GETLK, question))
            return kind != fcntl.F_UNLCK
        finally:
            os.close(descriptor)
    except OSError:  # no such file, or a file system without locks
        if not is_here or not isinstance(pid, int) or pid <= 0:
            return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _last_rows(metrics: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last row, and the last of a log step of training; empty where there is none."""
    last: dict[str, Any] = {}
    try:
        with _opened(metrics) as file:
            for line in _lines_backwards(file):
                row = _row(line) if not last or b'"train/loss"' in line else {}
                last = last or row
                if "train/loss" in row:
                    return last, row
    except OSError:
        pass
    return last, {}


def _lines_backwards(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, the last one first. What stands after the last line break was cut short: it is left out."""
    position, length, rest = file.seek(0, os.SEEK_END), _FIRST, None
    while position > 0:
        start = max(0, position - length)
        file.seek(start)
        first, *lines = (file.read(position - start) + (rest or b"")).split(b"\n")
        if rest is None and lines:
            lines.pop()
        elif rest is None:
            first = b""
        yield from reversed(lines)
        position, length, rest = start, 2 * length, first  # larger ones each time: a line may be as long as the file
    yield rest or b""


def _best_knn(metrics: Path) -> float | None:
    """The highest k-NN accuracy in the rows; they are searched, not parsed."""
    best, carried = None, b""
    try:
        with _opened(metrics) as file:
            while block := file.read(_BLOCK):
                block = carried + block
                for found in _KNN.finditer(block):
                    value = _number(_loaded(found[1]))
                    best = value if best is None or (value is not None and value > best) else best
                carried = block[-100:]  # an entry may be cut by the block's end
    except OSError:
        pass
    return best


def _evaluations(folder: Path) -> dict[str, float]:
    best: dict[str, float] = {}
    try:
        files = sorted(folder.glob("*.json"))
    except OSError:
        return best
    for file in files:
        results = _json(file).get("results")
        for name, value in (results if isinstance(results, dict) else {}).items():
            number = _number(value)
            if name.endswith("/top1_pct") and number is not None:
                best[name] = max(number, best.get(name, number))
    return best


def _opened(path: Path) -> IO[bytes]:
    """A file to read. Raises OSError where it is none, so that nobody waits for a pipe."""
    if not path.is_file():
        raise OSError
    return open(path, "rb")


def _loaded(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _row(line: bytes) -> dict[str, Any]:
    row = _loaded(line)
    return row if isinstance(row, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        with _opened(path) as file:
            return _row(file.read())
    except OSError:
        return {}


def _toml(path: Path) -> dict[str, Any]:
    try:
        with _opened(path) as file:
            return tomli.loads(file.read().decode())
    except (OSError, ValueError, RecursionError):
        return {}


def _number(value: Any) -> float | None:
    try:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return None
    return float(value) if is_number else None


def _age_s(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _of_total(run: Run) -> str:
    if run.epoch is None:
        return ""
    return f"{run.epoch:.1f}" if run.epochs is None else f"{run.epoch:.1f} / {run.epochs:g}"


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _shortened(name: str, size: int) -> str:
    """Without its middle where it is too long: names begin with the method and end with what was changed."""
    if len(name) <= size:
        return name
    tail = (size - 1) // 2
    return name[: size - 1 - tail] + "…" + (name[-tail:] if tail else "")
