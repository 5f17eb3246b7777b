"""What a run folder says of its run: recipe, rows, state, results. A file that is broken costs only itself."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslrun.config import Config, load
from sslrun.errors import UsageError
from sslrun.runs import Run, read_run
from sslrun.runtime.run_folder import rows


@dataclass
class Record:
    """A run as its folder tells it.

    Attributes:
        path: the run folder.
        checkpoint: what the user named: the folder itself, or a checkpoint in it.
        number: place among the runs of a report, from 0; None where it is the only one.
        name: of the folder, which is the recipe's.
        rows: of metrics.jsonl.
        run: as `sslrun runs` tells it.
        state: of state.json; empty where there is none.
        environment: of env.json; empty where there is none.
        results: of eval/*.json, in the order of kind and step.
        config: the resolved recipe; None where it cannot be read.
        broken: what could not be read, in words.
    """

    path: Path
    checkpoint: Path
    number: int | None
    name: str
    rows: list[dict[str, Any]]
    run: Run
    state: dict[str, Any]
    environment: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)
    config: Config | None = None
    broken: list[str] = field(default_factory=list)

    @property
    def letter(self) -> str:
        """A, B, ... among several runs; empty for a single one."""
        if self.number is None:
            return ""
        return chr(ord("A") + self.number) if self.number < 26 else str(self.number + 1)

    @property
    def color(self) -> int:
        """Number of its color."""
        return self.number or 0

    def series(self, key: str) -> list[tuple[float, float]]:
        """(epoch, value) of every row with this number."""
        return [
            (row["epoch"], row[key]) for row in self.rows if is_number(row.get(key)) and is_number(row.get("epoch"))
        ]

    def last(self, key: str) -> float | None:
        """The newest value; None if it was never measured."""
        series = self.series(key)
        return series[-1][1] if series else None

    def value(self, key: str) -> Any:
        """A value of the recipe by its dotted key; None where nothing is set."""
        value: Any = {} if self.config is None else self.config.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def wall_s(self) -> float | None:
        """Seconds from start to the last row, over all resumes."""
        return max((row["wall_s"] for row in self.rows if is_number(row.get("wall_s"))), default=None)


def read_record(named: Path, number: int | None) -> Record:
    """Read a run folder, or that of a checkpoint.

    Raises:
        UsageError: it is none.
    """
    path = named.resolve()
    if path.parent.name == "checkpoints":
        path = path.parent.parent
    if not (path / "config.toml").is_file() and not (path / "metrics.jsonl").is_file():
        what = "has neither config.toml nor metrics.jsonl" if path.is_dir() else "does not exist"
        raise UsageError(f"{named} {what}: name the folder of a run, work_dirs/<recipe name>, or a checkpoint in one")
    broken: list[str] = []

    def tried(name: str, read: Callable[[Path], Any]) -> Any:
        try:
            return read(path / name)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # UsageError is a ValueError
            broken.append(f"{name} cannot be read: {error}")
            return None

    record = Record(
        path=path,
        checkpoint=named,
        number=number,
        name=path.name,
        rows=tried("metrics.jsonl", lambda file: [row for _, row in rows(file)]) or [],
        run=read_run(path),
        state=tried("state.json", _table) or {},
        environment=tried("env.json", _table) or {},
        config=tried("config.toml", load),
        broken=broken,
    )
    for file in sorted((path / "eval").glob("*.json")):
        result = tried(f"eval/{file.name}", _table)
        if result is not None:
            record.results.append({**result, "file": file.name})
    return record


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _table(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError("it is no table")
    return value
