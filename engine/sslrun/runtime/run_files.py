"""The files of a run folder: their names, and how they are read. Imports no torch.

    config.toml     the resolved recipe           log.txt         messages
    env.json        versions and hardware         metrics.jsonl   one row of metrics per line
    machine.json    what the machine chose        checkpoints/    step_00001234, ...
    state.json      state of the run              eval/           results of `sslrun eval`
    profile/        what `--profile` found

`run_folder.py` writes them. The readers here work at any time: during the run, after a kill, and on damaged files.
"""

import errno
import json
import math
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import tomli

from sslrun.runtime import folder_lock

CONFIG, ENVIRONMENT, MACHINE, STATE = "config.toml", "env.json", "machine.json", "state.json"
STARTS = "starts"  # in machine.json
METRICS, MESSAGES, CHECKPOINTS, EVAL = "metrics.jsonl", "log.txt", "checkpoints", "eval"
PROFILE = "profile/profile.json"  # of `--profile`, beside a trace and a table

# Keys in the rows of metrics.jsonl that more than one file knows.
LOSS, RATE, KNN = "train/loss", "train/lr", "knn/top1_pct"
SPEED, WAIT, MEMORY = "speed/images_per_s", "data/wait_pct", "mem/peak_gib"

BLOCK_BYTES = 2**16
LINE_BYTES = 2**20  # a longer line is no row
TABLE_BYTES = 2**26  # a larger file is none of these tables
ROWS_BYTES = 2**32  # nor is it rows: ten million of them take this much

State = Literal["running", "done", "pre-empted", "failed", "interrupted"]


class RunFiles:
    """Reads a run folder. Reading never fails: a missing or damaged file counts as empty.

    Args:
        path: the run folder.

    Attributes:
        problems: why a file could not be read, by its name in the folder. Missing files are not listed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: dict[str, str] = {}

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def eval(self) -> Path:
        return self.path / EVAL

    def config(self) -> dict[str, Any]:
        """The resolved recipe."""
        return self._table(CONFIG, lambda data: tomli.loads(data.decode()))

    def state(self) -> dict[str, Any]:
        """What the run last recorded of itself: state, exit_code, error, pid, host, time."""
        return self._table(STATE)

    def environment(self) -> dict[str, Any]:
        """Versions, hardware and command of the run's last start."""
        return self._table(ENVIRONMENT)

    def machine(self) -> dict[str, Any]:
        """What the machine chose at the first start, by name; under `STARTS` from which step on how many ranks ran."""
        return self._table(MACHINE)

    def starts(self) -> list[dict[str, Any]]:
        """On how many ranks, nodes and which device the run started, and went on where that has changed, each from its
        "step" on. A number that is damaged, or that no version recorded, is None."""
        recorded = self.machine().get(STARTS)
        starts = [start for start in recorded if isinstance(start, dict)] if isinstance(recorded, list) else []
        return [
            {key: start.get(key) if type(start.get(key)) is int else None for key in ("step", "ranks", "nodes")}
            | {"device": start.get("device")}
            for start in starts
        ]

    def results(self) -> list[dict[str, Any]]:
        """The results of `sslrun eval`, by file name, which is under "file"."""
        try:
            names = sorted(file.name for file in self.eval.glob("*.json"))
        except OSError as error:
            self.problems[EVAL] = str(error)
            return []
        found = [(name, self._table(f"{EVAL}/{name}")) for name in names]
        return [{**result, "file": name} for name, result in found if result]

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl, oldest first."""
        try:
            return [row for _, row in rows(self.metrics)] if self.metrics.is_file() else []
        except OSError as error:
            self.problems[METRICS] = str(error)
            return []

    def metrics_blocks(self) -> Iterator[bytes]:
        """The bytes of metrics.jsonl, oldest first, in blocks of whole lines for `newest_rows`."""
        try:
            if self.metrics.is_file():
                with _opened(self.metrics) as file:
                    while block := file.read(BLOCK_BYTES):
                        yield block + file.readline(LINE_BYTES)
        except OSError as error:
            self.problems[METRICS] = str(error)

    def status(self) -> State | Literal["died"] | None:
        """State of the run: "died" if it ended without recording a state, None if the state is unknown."""
        record = self.state()
        state: State | None = record.get("state")
        if state not in get_args(State):
            return None
        return "died" if state == "running" and not self._is_alive(record) else state

    def _is_alive(self, record: dict[str, Any]) -> bool:
        """Whether the run's process lives: by the lock, else by its process id; yes if neither can tell."""
        pid, is_here = record.get("pid"), record.get("host") == socket.gethostname()
        if is_here and pid == os.getpid():
            return True
        is_held = folder_lock.is_held(self.path)
        if is_held is not None:
            return is_held
        if not is_here or not isinstance(pid, int) or pid <= 0:
            return True
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):
            return True
        return True

    def _table(self, name: str, parse: Callable[[bytes], Any] = json.loads) -> dict[str, Any]:
        path = self.path / name
        try:
            table = parse(content_of(path)) if path.is_file() else {}
            if not isinstance(table, dict):
                raise ValueError("it is not a table")
        except (OSError, ValueError, RecursionError) as error:
            self.problems[name] = str(error)
            return {}
        return table


def content_of(path: Path) -> bytes:
    """The bytes of one of the tables.

    Raises:
        OSError, ValueError: it cannot be read, is no file (reading a pipe would wait for its writer), or is too long.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    if path.stat().st_size > TABLE_BYTES:
        raise ValueError(f"it has more than {TABLE_BYTES:,} bytes")
    return path.read_bytes()


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint is in; None for a path that is not in one."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else None


def rows(metrics: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, row) of a metrics.jsonl, oldest first. A last line that a kill cut short is left out.

    Raises:
        OSError: it is not a file, cannot be read, or has more bytes than any run writes.
    """
    with _opened(metrics) as file:
        while line := file.readline(LINE_BYTES):
            row = _row(line)
            if row is not None and line.endswith(b"\n"):
                yield line, row


def _opened(metrics: Path) -> BinaryIO:
    found = os.stat(metrics)
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its writer
        raise OSError(errno.EINVAL, "it is not a file", str(metrics))
    if found.st_size > ROWS_BYTES:
        raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, and rows at most {ROWS_BYTES:,}", str(metrics))
    return open(metrics, "rb")


def newest_rows(block: bytes, key: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows in a block of metrics.jsonl, newest first: all of them, or those that have a key.

    Lines without the key are skipped unparsed, so that a million of them take a fraction of a second.
    """
    text = b"" if key is None else json.dumps(key).encode()
    end = block.rfind(b"\n")  # a line without an end was cut short by a kill
    while end >= 0 and (place := block.rfind(text, 0, end)) >= 0:
        start = block.rfind(b"\n", 0, place) + 1
        row = _row(block[start : block.find(b"\n", place)])
        if row is not None and (key is None or key in row):
            yield row
        end = start - 1


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
