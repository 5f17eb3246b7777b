"""`sslrun runs`: one line for each run below a folder, read from the run folders without changing them.

Missing or damaged files leave a gap, never an error. Imports no torch.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslrun.errors import printable
from sslrun.runtime.run_files import (
    CHECKPOINTS,
    CONFIG,
    KNN,
    LOSS,
    METRICS,
    SPEED,
    STATE,
    RunFiles,
    is_number,
    newest_rows,
)

_SHORTEST_NAME = 16  # columns


@dataclass(frozen=True)
class RunSummary:
    """How a run stands. None means not known.

    Attributes:
        path: the run folder.
        state: running, done, pre-empted, failed or interrupted; "died" if the process ended without recording it.
        exit_code: of the process.
        error: message of the error that ended the run.
        step: optimizer steps done, at the last row of metrics.jsonl.
        epoch: epochs done, at the last row.
        epochs: length of the run.
        loss: training loss of the newest row that has one; NaN if it was not finite.
        best_knn_top1_pct: highest k-NN accuracy of all rows.
        images_per_s: training speed in the newest row that has a loss.
        age_s: seconds since the last row was written.
        evaluations: best accuracy of each kind of `sslrun eval`, such as "linear/top1_pct".
    """

    path: Path
    state: str | None = None
    exit_code: int | None = None
    error: str | None = None
    step: int | None = None
    epoch: float | None = None
    epochs: float | None = None
    loss: float | None = None
    best_knn_top1_pct: float | None = None
    images_per_s: float | None = None
    age_s: float | None = None
    evaluations: dict[str, float] = field(default_factory=dict)


def find_runs(root: Path) -> Iterator[RunSummary]:
    """The runs in a folder and below it, in the order of their paths.

    Each folder is visited once, also if several links lead to it. Folders inside a run folder are not searched.
    """
    visited = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        if {STATE, METRICS} & set(files) or (CONFIG in files and CHECKPOINTS in folders):
            folders.clear()
            yield summarize(RunFiles(Path(folder)))
        folders[:] = sorted(name for name in folders if name != CHECKPOINTS and not name.startswith("."))


def summarize(files: RunFiles) -> RunSummary:
    """How the run in a folder stands."""
    last: dict[str, Any] = {}
    training: dict[str, Any] = {}
    accuracies: list[float] = []
    for block in files.metrics_blocks():
        last = next(newest_rows(block), last)
        training = next(newest_rows(block, LOSS), training)
        accuracies += [number for row in newest_rows(block, KNN) if (number := _number(row[KNN])) is not None]
    record, config = files.state(), files.config()
    step, epoch = _number(last.get("step")), _number(last.get("epoch"))
    epochs, steps = _number(config.get("epochs")), _number(config.get("max_iters"))
    if epochs is None and steps is not None and step and epoch:
        epochs = steps * epoch / step
    exit_code, error = record.get("exit_code"), record.get("error")
    return RunSummary(
        path=files.path,
        state=files.status(),
        exit_code=exit_code if isinstance(exit_code, int) else None,
        error=error if isinstance(error, str) else None,
        step=None if step is None else int(step),
        epoch=epoch,
        epochs=epochs,
        loss=math.nan if training.get(LOSS, 0) is None else _number(training.get(LOSS)),
        best_knn_top1_pct=max(accuracies, default=None),
        images_per_s=_number(training.get(SPEED)),
        age_s=_age_s(files.metrics) if last else None,
        evaluations=_best_accuracies(files.results()),
    )


def as_json(runs: Sequence[RunSummary]) -> str:
    """A JSON list of objects, one per run. A loss that was not finite is null."""
    tables = [{**vars(run), "path": str(run.path), "loss": _number(run.loss)} for run in runs]
    return json.dumps(tables, indent=1)


def as_table(runs: Sequence[RunSummary], root: Path, width: int) -> str:
    """One line per run. Columns are left out and names shortened until a line fits into `width` characters."""
    columns = {
        "run": [
            printable(os.path.relpath(run.path, root) if run.path != root else root.resolve().name) for run in runs
        ],
        "state": [f"{run.state or '?'}{f' ({run.exit_code})' if run.state == 'failed' else ''}" for run in runs],
        "epoch": [_of_total(run) for run in runs],
        "loss": [_text(run.loss, ".4f") for run in runs],
        "k-NN %": [_text(run.best_knn_top1_pct, ".1f") for run in runs],
        "images/s": [_text(run.images_per_s, ".0f") for run in runs],
        "last row": ["" if run.age_s is None else _ago(run.age_s) for run in runs],
    }
    sizes = {name: max(map(len, [name, *entries])) for name, entries in columns.items()}
    for name in ("images/s", "last row", "loss", "k-NN %", "epoch", "state"):
        free = width - sum(size + 2 for other, size in sizes.items() if other != "run")
        if free >= min(sizes["run"], _SHORTEST_NAME):
            break
        del columns[name], sizes[name]
    sizes["run"] = max(1, min(sizes["run"], width - sum(size + 2 for name, size in sizes.items() if name != "run")))
    columns["run"] = [_shortened(name, sizes["run"]) for name in columns["run"]]
    lines = [list(columns), *zip(*columns.values(), strict=True)]
    aligns = [str.ljust if name in ("run", "state") else str.rjust for name in columns]
    return "\n".join(
        "  ".join(align(cell, size) for align, cell, size in zip(aligns, line, sizes.values(), strict=True)).rstrip()
        for line in lines
    )


def _best_accuracies(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    best: dict[str, float] = {}
    for result in results:
        metrics = result.get("results")
        for name, value in (metrics if isinstance(metrics, dict) else {}).items():
            accuracy = _number(value)
            if name.endswith("/top1_pct") and accuracy is not None:
                best[name] = max(accuracy, best.get(name, accuracy))
    return best


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _age_s(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _of_total(run: RunSummary) -> str:
    if run.epoch is None:
        return ""
    return f"{run.epoch:.1f}" if run.epochs is None else f"{run.epoch:.1f} / {run.epochs:g}"


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _shortened(name: str, size: int) -> str:
    """Cut in the middle if it is too long: names begin with the method and end with what was changed."""
    if len(name) <= size:
        return name
    tail = (size - 1) // 2
    return name[: size - 1 - tail] + "…" + (name[-tail:] if tail else "")
