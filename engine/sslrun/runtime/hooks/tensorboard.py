"""The log hook for TensorBoard."""

import contextlib
import os
import threading
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sslrun.runtime.hooks.base import Hook, flat, library
from sslrun.runtime.run_files import CONFIG, KNN, LOSS

MEASURED = (LOSS, KNN)  # beside the hyperparameters, in their table
MOST = 500  # characters of a hyperparameter


@dataclass
class TensorBoard(Hook):
    """Writes the rows as TensorBoard event files, into `tensorboard/` of the run folder, with the recipe as text and as
    hyperparameters, and the first batch as an image."""

    def open(self, folder: Path, name: str, values: dict[str, Any], first_step: int) -> None:
        library("tensorboard", "tensorboard")
        torch_s = library("torch.utils.tensorboard", "tensorboard")
        purge_step = first_step + 1 if first_step else 0  # rows that a killed run wrote after that are not shown
        # It opens its file anew for each event, so it gets a path that leads to this folder and no other.
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        others = set(threading.enumerate())
        self._writer = torch_s.SummaryWriter(f"/proc/self/fd/{self._folder}/tensorboard", purge_step=purge_step)
        _keep_silent(set(threading.enumerate()) - others)
        hyperparameters = {key: value[:MOST] if isinstance(value, str) else value for key, value in flat(values)}
        for summary in torch_s.summary.hparams(hyperparameters, dict.fromkeys(MEASURED, 0.0)):
            self._writer.file_writer.add_summary(summary)
        with contextlib.suppress(OSError):
            lines = (folder / CONFIG).read_text(encoding="utf-8").splitlines()
            self._writer.add_text("recipe", "".join(f"    {line}\n" for line in lines), first_step)

    def write(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))
        self._writer.flush()  # a kill loses nothing

    def images(self, step: int, sheet: np.ndarray) -> None:
        self._writer.add_image("first batch", sheet, step, dataformats="HWC")

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
