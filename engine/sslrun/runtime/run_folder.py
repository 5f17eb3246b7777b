"""The run folder: one run's files, held by one process at a time, never overwritten by accident.

    config.toml     the resolved recipe          log.txt         messages
    env.json        what it was started with     metrics.jsonl   the numbers, one row per line
    machine.json    what the machine chose       checkpoints/    step_00001234, ...
    state.json      running, done, pre-empted, failed or interrupted      eval/

Rank 0 opens it; nothing in it is written by another process.
"""

import fcntl
import fnmatch
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import tomli

from sslrun.config import dump
from sslrun.errors import RunFailed, UsageError
from sslrun.runtime import checkpoint
from sslrun.runtime.durable import replace_file

logger = logging.getLogger(__name__)

State = Literal["running", "done", "pre-empted", "failed", "interrupted"]

# What a resume may change: how long, on what, how often saved and seen; not what is computed at a step. Values under
# `vars` count only where something refers to them, and there they are seen.
MAY_CHANGE = (
    "epochs",
    "max_iters",
    "work_dir",
    "resume_from",
    "load_from",
    "load_strict",
    "engine.*",
    "data.workers_per_gpu",
    "data.prefetch",
    "checkpoint.*",
    "log.*",
    "monitor.*",
    "eval.*",
    "vars.*",
)


class RunFolder:
    """An open, locked run folder. Use as a context manager, or call `close`.

    Args:
        path: the folder; made if it is not there.
        values: the resolved recipe.
        resume: continue what is in the folder, if there is something.

    Raises:
        UsageError: the folder cannot be made or written, another process has it, it holds a run and `resume` is not
            asked for, or the recipe differs from that run's in more than `MAY_CHANGE`. Nothing has been changed then.

    Attributes:
        path: the folder.
        is_resumed: whether a run was in it already.
    """

    def __init__(self, path: Path, values: dict[str, Any], resume: bool) -> None:
        self.path = path
        self._lock = _locked(path)
        try:
            self.is_resumed = self._holds_a_run()
            if self.is_resumed and not resume:
                raise UsageError(
                    f"{path} already holds a run{self._described()}: continue it with --resume, "
                    "or give the new one another --work-dir"
                )
            if self.is_resumed:
                self._check_config(values)
            checkpoint.sweep(self.checkpoints)
            self._machine: dict[str, Any] = (self._read("machine.json") or {}) if self.is_resumed else {}
            self._write("config.toml", dump(values).encode())
            self.record_state("running")
        except RunFailed as error:
            self.close()
            raise UsageError(str(error)) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def eval(self) -> Path:
        return self.path / "eval"

    def go_back_to(self, step: int) -> None:
        """Forget what came after a step, where the run goes on: rows of metrics.jsonl are cut, checkpoints set aside.

        Args:
            step: of the checkpoint that the run continues from; its rows stay, they were written before it was. Step 0
                has no checkpoint, the run starts anew: every row goes.
        """
        checkpoint.set_aside_newer(self.checkpoints, step)
        if self.metrics.exists():
            kept = [line for line, row in rows(self.metrics) if step > 0 and row.get("step", 0) <= step]
            self._write("metrics.jsonl", b"".join(kept))

    def machine_choice(self, name: str) -> Any:
        """What this run's machine chose for itself before; None where it did not."""
        return self._machine.get(name)

    def record_machine_choice(self, name: str, choice: Any) -> None:
        """Keep what the machine chose (JSON) for the next resume; the first choice stands."""
        if name not in self._machine:
            self._machine[name] = choice
            self.write_json("machine.json", self._machine)

    def record_state(self, state: State, exit_code: int | None = None, **details: Any) -> None:
        """Write state.json. Failing to is a warning: it must not hide how the run itself ended."""
        record = {"state": state, "exit_code": exit_code, "pid": os.getpid(), "host": socket.gethostname()}
        try:
            self.write_json("state.json", {**record, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **details})
        except RunFailed as error:
            logger.warning("%s", error)

    def write_json(self, name: str, value: Any) -> None:
        """Replace one of the folder's JSON files.

        Raises:
            RunFailed: it could not be written; the old one is untouched.
        """
        self._write(name, (json.dumps(value, indent=1) + "\n").encode())

    def close(self) -> None:
        """Let the folder go."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _write(self, name: str, data: bytes) -> None:
        try:
            replace_file(self.path / name, data)
        except OSError as error:
            raise RunFailed(f"{self.path / name} could not be written: {error.strerror}") from error

    def _read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder; None if it is missing or broken."""
        try:
            value = json.loads((self.path / name).read_bytes())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def _holds_a_run(self) -> bool:
        """Whether anything was computed here: a start that failed before its first row may be repeated as it is."""
        has_rows = self.metrics.exists() and self.metrics.stat().st_size > 0
        return has_rows or bool(checkpoint.steps(self.checkpoints))

    def _described(self) -> str:
        state = self._read("state.json") or {}
        return f" ({state['state']})" if isinstance(state.get("state"), str) else ""

    def _check_config(self, values: dict[str, Any]) -> None:
        try:
            old = tomli.loads((self.path / "config.toml").read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.path / 'config.toml'} cannot be compared with the recipe: {error}") from error
        changes = config_changes(old, tomli.loads(dump(values)))
        refused = [change for key, change in changes if not any(fnmatch.fnmatch(key, may) for may in MAY_CHANGE)]
        if refused:
            raise UsageError(
                f"{self.path} was started with another recipe; a resume cannot change "
                f"{'; '.join(refused)} (it may change {', '.join(MAY_CHANGE)})"
            )
        for _, change in changes:
            logger.info("changed on this resume: %s", change)


def config_changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, "key: old -> new") for every value that differs between two resolved recipes."""
    before, after = dict(_flat(old)), dict(_flat(new))
    return [
        (key, f"{key}: {_shown(before.get(key, _ABSENT))} -> {_shown(after.get(key, _ABSENT))}")
        for key in [*before, *(key for key in after if key not in before)]
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
        or isinstance(before.get(key), bool) != isinstance(after.get(key), bool)
    ]


def rows(metrics: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, row) of a metrics.jsonl; a last line that a kill cut short is left out."""
    with open(metrics, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and line.endswith(b"\n"):
                yield line, row


_ABSENT = object()


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested tables and lists of tables, under dotted keys."""
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, default=str)


def _locked(path: Path) -> int | None:
    """Make the folder and take its lock; the descriptor holds it for as long as the process lives."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UsageError(
            f"the run folder {path} cannot be written: {getattr(error, 'strerror', None) or error}; set work_dir "
            "(or --work-dir) to where it can"
        ) from error
    try:
        # A record lock: not inherited by forked workers that may outlive the run, and released by any kind of death.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise UsageError(f"the run folder {path} is in use by {holder}") from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): see to it that no second run uses it", path, error.strerror)
        return descriptor
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor
