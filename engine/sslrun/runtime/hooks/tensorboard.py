"""The log hook for TensorBoard."""

import os
import threading
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslrun.runtime.hooks.base import Hook, library


@dataclass
class TensorBoard(Hook):
    """Writes the rows as TensorBoard event files, into `tensorboard/` of the run folder."""

    def open(self, folder: Path, name: str, values: dict[str, Any], first_step: int) -> None:
        library("tensorboard", "tensorboard")
        writer = library("torch.utils.tensorboard", "tensorboard").SummaryWriter
        purge_step = first_step + 1 if first_step else 0  # rows that a killed run wrote after that are not shown
        # It opens its file anew for each event, so it gets a path that leads to this folder and no other.
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        others = set(threading.enumerate())
        self._writer = writer(f"/proc/self/fd/{self._folder}/tensorboard", purge_step=purge_step)
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
