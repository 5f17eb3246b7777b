"""A run as a report shows it: everything that its folder holds, and its letter and color among several runs."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sslrun.config import Config, load
from sslrun.errors import UsageError
from sslrun.report.encoder_name import EncoderFacts, encoder_facts
from sslrun.runs import RunSummary, summarize
from sslrun.runtime.run_files import CONFIG, METRICS, RunFiles, is_number, run_folder_of

# Keys in the rows of metrics.jsonl.
RANKME, SPREAD, PROBE = "spectrum/rankme", "train/feature_std", "probe/top1_pct"


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

    def points(self, key: str) -> dict[str, np.ndarray]:
        """The values of a series, under "y", with where each was measured: "epoch", "step" and "wall" (seconds of the
        run so far, over all resumes), NaN where a row does not say."""
        rows = [row for row in self.rows if is_number(row.get(key)) and is_number(row.get("epoch"))]
        places = {"y": key, "epoch": "epoch", "step": "step", "wall": "wall_s"}
        return {
            place: np.array([float(row[name]) if is_number(row.get(name)) else np.nan for row in rows])
            for place, name in places.items()
        }

    def last(self, key: str) -> float | None:
        """The newest value of a series; None if it is empty."""
        series = self.series(key)
        return series[-1][1] if series else None

    def trained(self, key: str) -> float | None:
        """The newest value that was measured after the first step; None if there is none."""
        values = [value for epoch, value in self.series(key) if epoch > 0]
        return values[-1] if values else None

    def is_last_bad(self, key: str) -> bool:
        """Whether the newest row that has the key has no finite number under it."""
        values = [row[key] for row in self.rows if key in row]
        return bool(values) and not is_number(values[-1])

    @property
    def rankme(self) -> float | None:
        """The newest RankMe of the trained encoder: of the training, else of `sslrun eval spectrum`."""
        results = [result.get("results") for result in self.results if result.get("kind") == "spectrum"]
        values = [result[RANKME] for result in results if isinstance(result, dict) and is_number(result.get(RANKME))]
        monitored = self.trained(RANKME)
        return monitored if monitored is not None else values[-1] if values else None

    def value(self, key: str) -> Any:
        """A value of the recipe by its dotted key; None if it is not set."""
        value: Any = {} if self.config is None else self.config.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @cached_property
    def encoder(self) -> EncoderFacts:
        """Name and size of the encoder."""
        return encoder_facts(self.config)

    @property
    def num_images(self) -> int | None:
        """Number of training images, rounded down to whole batches; None if the rows do not say."""
        batch, step, epoch = self.value("global_batch"), self.summary.step, self.summary.epoch
        return round(step / epoch) * batch if step and epoch and isinstance(batch, int) else None

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
