"""The run folder: one run's files, held by one process at a time, never overwritten by accident.

Rank 0 opens it; no other process writes to it. `run_files.py` lists the files and reads them. A folder that is moved,
removed or replaced while its run goes on ends the run, and nothing is written to what took its place.
"""

import contextlib
import fnmatch
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli

from sslrun.config import dump
from sslrun.errors import RunFailed, UsageError
from sslrun.runtime import checkpoint, folder_lock
from sslrun.runtime.durable import read_patiently, replace_or_fail
from sslrun.runtime.held import Held
from sslrun.runtime.run_files import CONFIG, MACHINE, STARTS, STATE, RunFiles, State, is_number, rows
from sslrun.runtime.signals import PREEMPTED

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


_NONE_SAVED = "has no checkpoint (it ended before its first, or they were removed)"


class RunFolder(RunFiles):
    """An open, locked run folder. Use as a context manager, or call `close`.

    Args:
        path: the folder; created if it does not exist.
        values: the resolved recipe, with absolute paths.
        resume: None refuses a folder that holds a run, "" continues that run from its newest good checkpoint, a path
            continues it from that checkpoint.
        absolute: makes the paths of a recipe absolute; earlier versions recorded them as typed.

    Raises:
        UsageError: the folder cannot be created or written, another process holds it, it holds a run and `resume` is
            None, that run has no good checkpoint and `resume` is "", or the recipe differs from that run's in more than
            `MAY_CHANGE`. Nothing has been changed then.
        RunFailed: the storage gives errors. Nothing has been changed.

    Attributes:
        path: where the folder is, also after it was moved.
        is_resumed: whether the folder already held a run.
        newest: the newest good checkpoint of that run; None for a new run, or if `resume` names a checkpoint.
        lost: why the run must stop: the folder or what it holds is no longer the same, or no longer writable. None if
            all is well. What can still be saved goes to `path`.
        exit_code: how the run ended, as far as this process has recorded it or tried to; None while it goes on.
    """

    def __init__(
        self,
        path: Path,
        values: dict[str, Any],
        resume: str | None,
        absolute: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        super().__init__(path)
        self._absolute = absolute
        self.lost: str | None = None
        self.exit_code: int | None = None
        self._is_out_of_reach = False
        self._stack = contextlib.ExitStack()
        self._lock = self._held(path / folder_lock.NAME, folder_lock.take(path))
        try:
            self._folder = self._held(path)
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

    def record_ranks(self, step: int, ranks: int, nodes: int, device: str) -> None:
        """Record, in machine.json under "starts", on how many ranks the run starts or goes on, if that has changed.

        Args:
            step: where it starts.
            ranks: number of processes.
            nodes: number of machines.
            device: what each computes on: "cpu" or "cuda".
        """
        recorded = self._machine_choices.get(STARTS)
        starts = [start for start in recorded if isinstance(start, dict)] if isinstance(recorded, list) else []
        before = starts[-1].get("ranks") if starts else ranks
        if before != ranks:
            logger.info("changed on this resume: number of ranks: %s -> %d", before, ranks)
        start = {"ranks": ranks, "nodes": nodes, "device": device}
        if not starts or {key: starts[-1].get(key) for key in start} != start:
            self._machine_choices[STARTS] = [*starts, {"step": step, **start}]
            self.write_json(MACHINE, self._machine_choices)

    def record_state(self, state: State, exit_code: int | None = None, **details: Any) -> None:
        """Write state.json. A failure is only a warning: it must not hide how the run itself ended."""
        try:
            self._write_state(state, exit_code, details)
        except RunFailed as error:
            if self.lost is None:  # otherwise the error that ends the run says more
                logger.warning("%s", error)

    def record_end(self, exit_code: int) -> None:
        """Record the end of a run that is done (0) or was stopped by a signal, and is saved.

        Raises:
            RunFailed: the folder is lost, or it cannot be recorded that the run is done.
        """
        self.look()
        if self.lost is not None:
            newest = max(checkpoint.steps(self.checkpoints), default=None)
            saved = "" if newest is None else f"; the newest checkpoint in {self.checkpoints} is of step {newest}"
            raise RunFailed(f"{self.lost}, and the run has stopped{saved}")
        if exit_code == 0:
            self._write_state("done", 0, {})
        else:
            self.record_state("pre-empted" if exit_code == PREEMPTED else "interrupted", exit_code)

    def write_json(self, name: str, value: Any) -> None:
        """Replace one of the folder's JSON files.

        Raises:
            RunFailed: it could not be written, or the folder is lost; the old one is untouched.
        """
        self.look()
        if self.lost is not None:
            raise RunFailed(self.lost)
        self._replace(name, value)

    def hold(self, path: Path, descriptor: int) -> None:
        """Let `look` include a file that only grows; `descriptor` is open as long as `look` is called."""
        self._inside.append(Held(path, descriptor, grows=True))

    def look(self) -> None:
        """Set `lost` if the folder or what it holds is no longer the same, or no longer writable.

        Raises:
            RunFailed: nothing can be saved there, since the folder is gone or another process uses it; or the storage
                gives errors.
        """
        if self.lost is None:
            self._look()
        if self._is_out_of_reach:
            raise RunFailed(self.lost)

    def close(self) -> None:
        """Release the folder."""
        self._stack.close()

    def _held(self, path: Path, descriptor: int | None = None) -> Held:
        """What is under a path, open until the folder is released."""
        held = Held(path, descriptor)
        self._stack.callback(os.close, held.descriptor)
        return held

    def _look(self) -> None:
        if (change := self._folder.change()) is not None:
            self.lost = f"the run folder {self.path} {change} during the run"
            place = self._folder.place()
            self.path, self._is_out_of_reach = place or self.path, place is None
            return
        changes = {held.path: change for held in self._inside if (change := held.change()) is not None}
        for path, change in changes.items():
            self.lost = f"{path} {change} during the run"
            # Without the lock's file another process may have started here. Its own file may be asked, ours not.
            self._is_out_of_reach = self._lock.path in changes and folder_lock.is_held(self.path) is True
            return

    def _write_state(self, state: State, exit_code: int | None, details: Mapping[str, Any]) -> None:
        self.exit_code = exit_code
        record = {"state": state, "exit_code": exit_code, "pid": os.getpid(), "host": socket.gethostname()}
        self._replace(STATE, {**record, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **details})

    def _replace(self, name: str, value: Any) -> None:
        if self._is_out_of_reach:
            raise RunFailed(str(self.lost))
        replace_or_fail(self.path / name, (json.dumps(value, indent=1) + "\n").encode())

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
            known = f" ({state})" if isinstance(state, str) else ""
            if not saved:
                raise UsageError(
                    f"{self.path} already holds a run{known} that {_NONE_SAVED}: --restart sets it aside and starts "
                    "from the beginning; or give the new one another --work-dir"
                )
            raise UsageError(
                f"{self.path} already holds a run{known}: continue it with --resume, give the new one another "
                "--work-dir, or set the old one aside with --restart"
            )
        if resume:
            return
        self.newest = checkpoint.newest_good(self.checkpoints)
        if self.newest is None:
            missing = f"none of its {len(saved)} checkpoints is intact" if saved else f"it {_NONE_SAVED}"
            raise UsageError(
                f"{self.path} holds a run that cannot be continued: {missing}. --restart sets it aside and starts from "
                "the beginning, --resume=CHECKPOINT continues from another checkpoint"
            )

    def _begin(self, values: dict[str, Any]) -> None:
        """The first changes in the folder. Raises UsageError if it cannot be written."""
        checkpoint.sweep(self.checkpoints)
        self._machine_choices = self.machine() if self.is_resumed else {}
        try:
            self.checkpoints.mkdir(exist_ok=True)
            replace_or_fail(self.path / CONFIG, dump(values).encode())
        except OSError as error:
            raise UsageError(f"{self.checkpoints} cannot be made: {error.strerror}") from error
        except RunFailed as error:
            raise UsageError(str(error)) from error
        self._inside = [self._lock, self._held(self.checkpoints)]
        self.record_state("running")

    def _check_config(self, values: dict[str, Any]) -> None:
        old = self.config()
        if not old:
            reason = self.problems.get(CONFIG, "it is missing or empty")
            raise UsageError(f"{self.path / CONFIG} cannot be compared with the recipe: {reason}")
        old, new = self._absolute(old), tomli.loads(dump(values))
        before, after = dict(_flat(old)), dict(_flat(new))
        changes = config_changes(old, new)
        refused = [
            change
            for key, change in changes
            if not any(fnmatch.fnmatch(key, may) for may in MAY_CHANGE)
            and not _has_moved(before.get(key), after.get(key))
        ]
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


def _has_moved(old: Any, new: Any) -> bool:
    """Whether two values are absolute paths of one last name, and the old one is gone: the project was moved."""
    are_paths = all(isinstance(value, str) and os.path.isabs(value) for value in (old, new))
    return are_paths and os.path.basename(old) == os.path.basename(new) and not os.path.exists(old)


def record_loss(path: Path, begun: Mapping[str, Any], error: str) -> None:
    """Record that a run has failed, from a rank that does not hold its folder: rank 0, which holds it, is missing.

    Does nothing if state.json is no longer what rank 0 wrote at the start, or not there: on storage of another machine.

    Args:
        path: the run folder.
        begun: the state at the start.
        error: what has happened.
    """
    if begun and RunFiles(path).state() == begun:
        ended = {"state": "failed", "exit_code": 1, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "error": error}
        try:
            replace_or_fail(path / STATE, (json.dumps({**begun, **ended}, indent=1) + "\n").encode())
        except RunFailed as problem:
            logger.warning("%s", problem)


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
