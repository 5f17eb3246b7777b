"""A run as a report shows it: everything that its folder holds, and its letter and color among several runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslrun.config import Config, load
from sslrun.errors import UsageError
from sslrun.runs import RunSummary, summarize
from sslrun.runtime.run_files import CONFIG, METRICS, RunFiles, is_number, run_folder_of


@dataclass(frozen=True)
class ReportedRun:
    """The contents of a run folder. Missing and damaged files are empty.

    Attributes:
        path: the run folder.
        checkpoint: the path that the user gave: the run folder, or a checkpoint in it.
        number: place among the runs of the report, from 0; None if it is the only one.
        rows: of metrics.jsonl, oldest first.
        summary: what `sslrun runs` shows of the run.
        state: of state.json.
        environment: of env.json.
        results: of eval/*.json, by file name.
        config: the resolved recipe; None if it cannot be read.
        problems: why a file could not be read, by its name in the folder.
    """

    path: Path
    checkpoint: Path
    number: int | None
    rows: list[dict[str, Any]]
    summary: RunSummary
    state: dict[str, Any]
    environment: dict[str, Any]
    results: list[dict[str, Any]]
    config: Config | None
    problems: dict[str, str]

    @property
    def name(self) -> str:
        """Name of the run folder, which is the recipe's."""
        return self.path.name

    @property
    def letter(self) -> str:
        """A, B, ... among several runs; empty for a single one."""
        if self.number is None:
            return ""
        return chr(ord("A") + self.number) if self.number < 26 else str(self.number + 1)

    @property
    def color(self) -> int:
        """Number of the run's color."""
        return self.number or 0

    def series(self, key: str) -> list[tuple[float, float]]:
        """(epoch, value) of every row that has a finite value under the key."""
        return [
            (row["epoch"], row[key]) for row in self.rows if is_number(row.get(key)) and is_number(row.get("epoch"))
        ]

    def last(self, key: str) -> float | None:
        """The newest value of a series; None if it is empty."""
        series = self.series(key)
        return series[-1][1] if series else None

    def value(self, key: str) -> Any:
        """A value of the recipe by its dotted key; None if it is not set."""
        value: Any = {} if self.config is None else self.config.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def wall_s(self) -> float | None:
        """Seconds from the start to the last row, over all resumes."""
        return max((row["wall_s"] for row in self.rows if is_number(row.get("wall_s"))), default=None)


def read_run(path: Path, number: int | None) -> ReportedRun:
    """Read a run folder.

    Args:
        path: the run folder, or a checkpoint in it.
        number: place among the runs of the report, from 0; None if it is the only one.

    Raises:
        UsageError: the path is neither.
    """
    folder = run_folder_of(path.resolve()) or path.resolve()
    if not (folder / CONFIG).is_file() and not (folder / METRICS).is_file():
        problem = f"has neither {CONFIG} nor {METRICS}" if folder.is_dir() else "does not exist"
        raise UsageError(f"{path} {problem}: name the folder of a run, work_dirs/<recipe name>, or a checkpoint in one")
    files = RunFiles(folder)
    return ReportedRun(
        path=folder,
        checkpoint=path,
        number=number,
        rows=files.rows(),
        summary=summarize(files),
        state=files.state(),
        environment=files.environment(),
        results=files.results(),
        config=_config(files),
        problems=files.problems,
    )


def _config(files: RunFiles) -> Config | None:
    try:
        return load(files.path / CONFIG) if (files.path / CONFIG).is_file() else None
    except (UsageError, OSError) as error:
        files.problems[CONFIG] = str(error)
        return None
