"""The run folder: one run's files, held by one process at a time, never overwritten by accident.

Rank 0 opens it; no other process writes to it. `run_files.py` lists the files and reads them.
"""

import fnmatch
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli

from sslrun.config import dump
from sslrun.errors import RunFailed, UsageError
from sslrun.runtime import checkpoint, folder_lock
from sslrun.runtime.durable import read_patiently, replace_or_fail
from sslrun.runtime.run_files import CONFIG, MACHINE, STATE, RunFiles, State, is_number, rows

logger = logging.getLogger(__name__)

# What a resume may change: the run's length, the hardware, how often it saves and measures; not what a step computes.
# A value under `vars` counts where it is referred to, and is compared there; a module of `custom_imports` where a table
# names one of its classes.
MAY_CHANGE = (
    "epochs",
    "max_iters",
    "work_dir",
    "resume_from",
    "load_from",
    "load_strict",
    "custom_imports",
    "custom_imports.*",
    "engine.*",
    "data.workers_per_gpu",
    "data.prefetch",
    "checkpoint.*",
    "log.*",
    "monitor.*",
    "eval.*",
    "vars.*",
)


class RunFolder(RunFiles):
    """An open, locked run folder. Use as a context manager, or call `close`.

    Args:
        path: the folder; created if it does not exist.
        values: the resolved recipe.
        resume: None refuses a folder that holds a run, "" continues that run from its newest good checkpoint, a path
            continues it from that checkpoint.

    Raises:
        UsageError: the folder cannot be created or written, another process holds it, it holds a run and `resume` is
            None, that run has no good checkpoint and `resume` is "", or the recipe differs from that run's in more than
            `MAY_CHANGE`. Nothing has been changed then.
        RunFailed: the storage gives errors. Nothing has been changed.

    Attributes:
        is_resumed: whether the folder already held a run.
        newest: the newest good checkpoint of that run; None for a new run, or if `resume` names a checkpoint.
    """

    def __init__(self, path: Path, values: dict[str, Any], resume: str | None) -> None:
        super().__init__(path)
        self._lock: int | None = folder_lock.take(path)
        try:
            saved = checkpoint.steps(self.checkpoints)
            self.is_resumed = bool(saved) or self._has_rows()
            self.newest: Path | None = None
            if self.is_resumed:
                self._check_start(resume, saved)
                self._check_config(values)
            self._begin(values)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def go_back_to(self, step: int) -> None:
        """Cut the rows of metrics.jsonl after a step, and set the checkpoints after it aside.

        Args:
            step: step of the checkpoint that the run continues from. Rows of this step stay, because they were written
                before the checkpoint. At step 0 all rows are removed.
        """
        checkpoint.set_aside_newer(self.checkpoints, step)
        if self.metrics.exists():
            kept = [line for line, row in rows(self.metrics) if step > 0 and _step_of(row) <= step]
            replace_or_fail(self.metrics, b"".join(kept))

    def machine_choice(self, name: str) -> Any:
        """What this run's machine chose at an earlier start; None if nothing."""
        return self._machine_choices.get(name)

    def record_machine_choice(self, name: str, choice: Any) -> None:
        """Record what the machine chose (JSON) for the next resume. The first choice stays."""
        if name not in self._machine_choices:
            self._machine_choices[name] = choice
            self.write_json(MACHINE, self._machine_choices)

    def record_state(self, state: State, exit_code: int | None = None, **details: Any) -> None:
        """Write state.json. A failure is only a warning: it must not hide how the run itself ended."""
        record = {"state": state, "exit_code": exit_code, "pid": os.getpid(), "host": socket.gethostname()}
        try:
            self.write_json(STATE, {**record, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **details})
        except RunFailed as error:
            logger.warning("%s", error)

    def write_json(self, name: str, value: Any) -> None:
        """Replace one of the folder's JSON files.

        Raises:
            RunFailed: it could not be written; the old one is untouched.
        """
        replace_or_fail(self.path / name, (json.dumps(value, indent=1) + "\n").encode())

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _has_rows(self) -> bool:
        """Whether metrics.jsonl has content, other than measurements of the untrained network. A start that ended
        before its first step may be repeated."""
        try:
            size = read_patiently(self.metrics, os.stat).st_size
            return size > 0 and not (self.metrics.is_file() and read_patiently(self.metrics, _is_untrained))
        except FileNotFoundError:
            return False

    def _check_start(self, resume: str | None, saved: Mapping[int, Path]) -> None:
        """Finds the checkpoint to continue from; raises UsageError if the folder's run must not be continued."""
        if resume is None:
            state = self.state().get("state")
            raise UsageError(
                f"{self.path} already holds a run{f' ({state})' if isinstance(state, str) else ''}: continue it with "
                "--resume, give the new one another --work-dir, or set the old one aside with --restart"
            )
        if resume:
            return
        self.newest = checkpoint.newest_good(self.checkpoints)
        if self.newest is None:
            missing = f"none of its {len(saved)} checkpoints is intact" if saved else "it has no checkpoint"
            raise UsageError(
                f"{self.path} holds a run that cannot be continued: {missing}. --restart sets it aside and starts from "
                "the beginning, --resume=CHECKPOINT continues from another checkpoint"
            )

    def _begin(self, values: dict[str, Any]) -> None:
        """The first changes in the folder. Raises UsageError if it cannot be written."""
        checkpoint.sweep(self.checkpoints)
        self._machine_choices = self.machine() if self.is_resumed else {}
        try:
            replace_or_fail(self.path / CONFIG, dump(values).encode())
        except RunFailed as error:
            raise UsageError(str(error)) from error
        self.record_state("running")

    def _check_config(self, values: dict[str, Any]) -> None:
        old = self.config()
        if not old:
            reason = self.problems.get(CONFIG, "it is missing or empty")
            raise UsageError(f"{self.path / CONFIG} cannot be compared with the recipe: {reason}")
        changes = config_changes(old, tomli.loads(dump(values)))
        refused = [change for key, change in changes if not any(fnmatch.fnmatch(key, may) for may in MAY_CHANGE)]
        if refused:
            raise UsageError(
                f"{self.path} was started with another recipe; a resume cannot change "
                f"{'; '.join(refused)} (it may change {', '.join(MAY_CHANGE)})"
            )
        for _, change in changes:
            logger.info("changed on this resume: %s", change)


def _is_untrained(metrics: Path) -> bool:
    """Whether a metrics.jsonl has whole rows of step 0 and nothing else."""
    size = 0
    for line, row in rows(metrics):
        if row.get("step") != 0:
            return False
        size += len(line)
    return size == metrics.stat().st_size


def _step_of(row: Mapping[str, Any]) -> float:
    """The step of a row; 0 for a row without one, which no run writes."""
    return float(row["step"]) if is_number(row.get("step")) else 0.0


def set_aside(path: Path) -> None:
    """Rename a run folder to NAME.before-YYYYMMDD-HHMMSS, so that a new run can start under its name.

    Raises:
        UsageError: another process holds the folder, or it cannot be renamed.
    """
    if not path.exists():
        return
    lock = folder_lock.take(path)
    try:
        aside = path.with_name(f"{path.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        os.rename(path, aside)
    except OSError as error:
        raise UsageError(f"{path} cannot be renamed: {error.strerror}") from error
    finally:
        os.close(lock)
    logger.info("the old run is kept as %s", aside)


def config_changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, "key: old -> new") for every value that differs between two resolved recipes."""
    before, after = dict(_flat(old)), dict(_flat(new))
    return [
        (key, f"{key}: {_shown(before.get(key, _ABSENT))} -> {_shown(after.get(key, _ABSENT))}")
        for key in [*before, *(key for key in after if key not in before)]
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
        or isinstance(before.get(key), bool) != isinstance(after.get(key), bool)
    ]


_ABSENT = object()


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of nested tables and lists of tables."""
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, default=str)
