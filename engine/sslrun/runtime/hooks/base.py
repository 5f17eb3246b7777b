"""What a log hook is: a receiver of a run's rows."""

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sslrun.config.component import Component
from sslrun.errors import UsageError
from sslrun.runtime.run_files import METRICS, is_number, rows


class Hook(Component, kind="hooks"):
    """Receives every row of a run, on rank 0, in a thread of its own: nothing that it does delays a step.

    Its constructor's arguments are the keys of its table in `log.hooks`. An exception that `write` or `close` raises
    ends the hook, not the run; `close` is called then, too.

    Attributes:
        missed: rows of before a resume that the receiver lacks, oldest first; set by `open`. They are written before
            the first new one, and the run does not wait for that.
        exit_code: exit code of the run (README.md), set before `close`; 1 also if the hook ends before the run.
    """

    names_itself = False  # `[log.wandb]` is a WandB without saying so
    missed: Sequence[Mapping[str, float]] = ()
    exit_code: int = 1

    def open(self, folder: Path, name: str, values: dict[str, Any], first_step: int) -> None:
        """Called once, before the first row. What it raises ends a new run; a resumed run goes on without the hook.

        Args:
            folder: the run folder.
            name: the recipe's name.
            values: the resolved recipe.
            first_step: optimizer steps that are done already; above 0 in a run that was resumed.

        Raises:
            UsageError: it cannot be used here, for example because a package is missing; also ends a resumed run.
        """

    def write(self, row: Mapping[str, float]) -> None:
        """One row of metrics.jsonl: `step`, `epoch`, `wall_s` and finite numbers by `group/name`."""
        raise NotImplementedError

    def images(self, step: int, sheet: np.ndarray) -> None:
        """The first batch that this process trains on, as one image. A run whose hooks do not define this method does
        not make the image, for which the host waits for the device once.

        Args:
            step: optimizer steps before that batch.
            sheet: (H, W, 3) uint8, a row for each of the first samples with its views side by side.
        """

    def close(self) -> None:
        """Called once, after the last row. The run waits for it for half a minute at most."""

    def abort(self) -> None:
        """Called if the run cannot wait for `close` or `open`, from another thread, while they are still at work."""


def earlier_rows(folder: Path) -> Iterator[dict[str, float]]:
    """What `Hook.write` got, or would have got, up to the step that a run is resumed from, oldest first. For receivers
    that may have missed some: of the last minutes of a run that was killed, of a server that did not answer."""
    if (folder / METRICS).exists():
        for _, row in rows(folder / METRICS):
            if isinstance(row.get("step"), int):
                yield {name: value for name, value in row.items() if is_number(value)}


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """(dotted key, value) of every value of a recipe. A list, also of tables, is one text; so are empty tables."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, (bool, int, float, str)) else json.dumps(value)


def library(module: str, package: str) -> Any:
    """A module of a package that only some installations have.

    Raises:
        UsageError: it cannot be imported; says whether the package is missing, or what else is the cause.
    """
    word = package.partition("-")[0]
    missing = f'log.hooks: "{word}" needs a package: pip install {package}'
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # what a broken installation raises has no common type
        if isinstance(error, ModuleNotFoundError) and error.name == word:
            raise UsageError(missing) from None
        cause = (str(error).splitlines() or [""])[0]
        raise UsageError(f'log.hooks: "{word}" is installed, but cannot be imported: {_kind(error)}{cause}') from error
    if getattr(imported, "__file__", None) is None:  # a folder of that name, such as wandb writes, counts as a package
        raise UsageError(f"{missing} ({', '.join(imported.__path__)} is a folder, not the package)")
    return imported


def _kind(error: Exception) -> str:
    return "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
