"""Log hooks: further places that the rows of a run go to, beside metrics.jsonl.

To add one, write a class like those below and name it in `log.hooks` (docs/add-a-metric.md).
"""

import logging
import os
import threading
import uuid
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from sslrun.config.component import Component
from sslrun.errors import UsageError

logger = logging.getLogger(__name__)


class Hook(Component, kind="hooks"):
    """Receives every row of a run, on rank 0. An exception that `write` or `close` raises ends the hook, not the run.

    Its constructor's arguments are the keys of its table in `log.hooks`.
    """

    def open(self, folder: Path, name: str, values: dict[str, Any], first_step: int) -> None:
        """Called once, before the first row; what it raises ends the run.

        Args:
            folder: the run folder.
            name: the recipe's name.
            values: the resolved recipe.
            first_step: optimizer steps that are done already; above 0 in a run that was resumed.
        """

    def write(self, row: Mapping[str, float]) -> None:
        """One row of metrics.jsonl: `step`, `epoch`, `wall_s` and finite numbers by `group/name`."""
        raise NotImplementedError

    def close(self) -> None:
        """Called once, after the last row."""


class TensorBoard(Hook):
    """Writes the rows as TensorBoard event files, into `tensorboard/` of the run folder."""

    def open(self, folder: Path, name: str, values: dict[str, Any], first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError('log.hooks: "tensorboard" needs a package: pip install tensorboard') from error
        purge_step = first_step + 1 if first_step else 0  # rows that a killed run wrote after that are not shown
        # It opens its file anew for each event, so it gets a path that leads to this folder and no other.
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        others = set(threading.enumerate())
        self._writer = SummaryWriter(f"/proc/self/fd/{self._folder}/tensorboard", purge_step=purge_step)
        _keep_silent(set(threading.enumerate()) - others)

    def write(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        try:
            self._writer.close()
        finally:
            os.close(self._folder)


def _keep_silent(threads: AbstractSet[threading.Thread]) -> None:
    """Print no traceback of these threads: the error that ended one is raised by the next call of its writer."""
    report = threading.excepthook

    def report_others(args: threading.ExceptHookArgs) -> None:
        if args.thread not in threads:
            report(args)

    threading.excepthook = report_others


class WandB(Hook):
    """Sends the rows to Weights & Biases, as one run over all resumes; offline without an account or a network.

    Args:
        project: project of the W&B run.
    """

    def __init__(self, project: str = "sslrun") -> None:
        self.project = project

    def open(self, folder: Path, name: str, values: dict[str, Any], first_step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UsageError('log.hooks: "wandb" needs a package: pip install wandb') from error
        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        options = {
            "project": self.project,
            "name": name,
            "config": values,
            "dir": str(folder),
            "id": id_file.read_text().strip(),
            "resume": "allow",
        }
        try:
            self._run = wandb.init(**options)
        except Exception as error:
            logger.warning('log.hooks: "wandb" cannot reach its server and writes offline (wandb sync): %s', error)
            self._run = wandb.init(**options, mode="offline")

    def write(self, row: Mapping[str, float]) -> None:
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


BY_WORD: dict[str, type[Hook]] = {"tensorboard": TensorBoard, "wandb": WandB}
"""What the strings in `log.hooks` stand for."""
