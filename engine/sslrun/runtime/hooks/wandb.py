"""The log hook for Weights & Biases."""

import contextlib
import inspect
import logging
import os
import signal
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslrun.runtime.early_signals import PREEMPTED
from sslrun.runtime.hooks.base import Hook, earlier_rows, library

logger = logging.getLogger(__name__)

ONLINE_S = 30.0  # for the first answer of the server


@dataclass
class WandB(Hook):
    """Sends the rows to Weights & Biases, as one run over all resumes; offline without an account or a network.

    It never asks for an account: without a key (`wandb login`, WANDB_API_KEY), or where the server does not answer, it
    writes into `wandb/` of the run folder, for `wandb sync`. WANDB_MODE and the other variables of the library count.

    Args:
        project: project of the W&B run.
        name: name of the W&B run; by default the recipe's.
        group: group of runs that it belongs to, such as the seeds of one recipe.
        tags: tags, besides those of `log.tags`.
        notes: a longer description.
        entity: user or team; by default the account's own.
    """

    project: str = "sslrun"
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    entity: str | None = None

    def open(self, folder: Path, name: str, values: dict[str, Any], first_step: int) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it reports to its makers, also offline
        self._wandb = wandb = library("wandb", "wandb")
        tags = dict.fromkeys([*values.get("log", {}).get("tags", []), *self.tags])
        options = {
            "project": self.project,
            "name": self.name or name,
            "group": self.group,
            "tags": list(tags),
            "notes": self.notes,
            "entity": self.entity,
            "config": values,
            "dir": str(folder),
            "id": _id_of(folder),
            "resume": "allow",
        }
        # Its own lines, and its copy of ours, would tear the bar; its debug log prints tracebacks on a full disk.
        settings: dict[str, Any] = {"silent": True, "console": "off"}
        logging.getLogger("wandb").addFilter(_drop)
        wandb.setup(settings=wandb.Settings(silent=True))
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            settings["init_timeout"] = ONLINE_S
        mode = None if "WANDB_MODE" in os.environ or _has_account(wandb) else "offline"
        try:
            self._run = wandb.init(**options, mode=mode, settings=wandb.Settings(**settings))
        except Exception as error:
            logger.warning("log.wandb: the server cannot be reached: %s", " ".join(str(error).split()))
            self.abort()  # nothing is lost yet; versions before 0.20 would wait for the server for ever
            self._end()
            self._run = wandb.init(**options, mode="offline", settings=wandb.Settings(**settings))
        if self._run.offline:
            logger.info("W&B: offline; upload it with: wandb sync %s", Path(self._run.dir).parent)
        elif self._run.url:
            logger.info("W&B: %s", self._run.url)
        # A run offline begins at 0: each of its folders holds all rows.
        self.missed = [row for row in earlier_rows(folder) if row["step"] >= self._run.starting_step]

    def write(self, row: Mapping[str, float]) -> None:
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def close(self) -> None:
        try:
            if self.exit_code == PREEMPTED:
                self._run.mark_preempting()  # shown as "preempted", not as "failed"
            self._run.finish(exit_code=self.exit_code)
        finally:
            self._end()

    def abort(self) -> None:
        # What waits for the process returns then, also the library's own work at the exit of ours.
        for process in _processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _end(self) -> None:
        """Ends the library's process, without its traceback at the exit if it has died."""
        with contextlib.suppress(Exception, SystemExit):
            self._wandb.teardown()


def _drop(record: logging.LogRecord) -> bool:
    return False


def _id_of(folder: Path) -> str:
    """The id of the folder's run at W&B; made at the first start."""
    file = folder / "wandb_id"
    if not (file.exists() and file.read_text().strip()):
        file.write_text(uuid.uuid4().hex[:8])
    return file.read_text().strip()


def _has_account(wandb: Any) -> bool:
    """Whether there is a key; the library asks for one otherwise, if there is a terminal."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)  # before 0.30


def _processes() -> Iterator[int]:
    """The processes of the library that this one has started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, fields = stat.read_text().partition("(")[2].rpartition(")")
            if name.startswith("wandb") and int(fields.split()[1]) == os.getpid():
                yield int(stat.parent.name)
