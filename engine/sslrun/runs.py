"""`sslrun runs`: one line for each run below a folder, read from the run folders without changing them.

Missing or damaged files leave a gap, never an error. Imports no torch.
"""

import csv
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sslrun.errors import UsageError, printable
from sslrun.glossary import better
from sslrun.number_format import after, measured, number
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
_MOST_STARTS = 3  # in the column of ranks


@dataclass(frozen=True)
class Best:
    """The best value of a metric in a run, by `glossary.better`: in a row, or in the result of an evaluation.

    Attributes:
        value: the value.
        epoch: epochs done when it was measured, or of the weights that were evaluated.
        step: optimizer steps, likewise.
    """

    value: float
    epoch: float | None
    step: int | None


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
        ranks: number of processes of the newest start.
        nodes: number of machines of the newest start.
        starts: step, ranks, nodes and device of the first start, and of each one that changed something of it.
        evaluations: best accuracy of each kind of `sslrun eval`, such as "linear/top1_pct".
        tags: `log.tags` of the recipe.
        best: the best value of each metric that was asked for and that the run has.
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
    ranks: int | None = None
    nodes: int | None = None
    starts: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, float] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    best: dict[str, Best] = field(default_factory=dict)


def find_runs(root: Path, metrics: Sequence[str] = ()) -> Iterator[RunSummary]:
    """The runs in a folder and below it, in the order of their paths; with the best values of these metrics.

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
            yield summarize(RunFiles(Path(folder)), metrics)
        folders[:] = sorted(name for name in folders if name != CHECKPOINTS and not name.startswith("."))


def summarize(files: RunFiles, metrics: Sequence[str] = ()) -> RunSummary:
    """How the run in a folder stands, with the best values of these metrics."""
    last: dict[str, Any] = {}
    training: dict[str, Any] = {}
    best: dict[str, Best] = {}
    for block in files.metrics_blocks():
        last = next(newest_rows(block), last)
        training = next(newest_rows(block, LOSS), training)
        for metric in {KNN, *metrics}:
            for row in [*newest_rows(block, metric)][::-1]:
                _keep_better(best, metric, row[metric], row)
    best_knn = best[KNN].value if KNN in best else None
    record, config, results = files.state(), files.config(), files.results()
    for result in results:
        for metric, value in _table(result.get("results")).items():
            _keep_better(best, metric, value, result)
    step, epoch = _number(last.get("step")), _number(last.get("epoch"))
    epochs, steps = _number(config.get("epochs")), _number(config.get("max_iters"))
    if epochs is None and steps is not None and step and epoch:
        epochs = steps * epoch / step
    exit_code, error, starts = record.get("exit_code"), record.get("error"), files.starts()
    tags = _table(config.get("log")).get("tags")
    return RunSummary(
        path=files.path,
        state=files.status(),
        exit_code=exit_code if isinstance(exit_code, int) else None,
        error=error if isinstance(error, str) else None,
        step=None if step is None else int(step),
        epoch=epoch,
        epochs=epochs,
        loss=math.nan if training.get(LOSS, 0) is None else _number(training.get(LOSS)),
        best_knn_top1_pct=best_knn,
        images_per_s=_number(training.get(SPEED)),
        age_s=_age_s(files.metrics) if last else None,
        ranks=starts[-1]["ranks"] if starts else None,
        nodes=starts[-1]["nodes"] if starts else None,
        starts=starts,
        evaluations=_best_accuracies(results),
        tags=[tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else [],
        best={metric: best[metric] for metric in metrics if metric in best},
    )


def _keep_better(best: dict[str, Best], metric: str, value: Any, where: dict[str, Any]) -> None:
    """Puts a value into `best` if it is better than what is there; of equal ones the first stays."""
    new = _number(value)
    if new is None:
        return
    old = best.get(metric)
    if old is None or (new > old.value if better(metric) == "higher" else new < old.value):
        step = _number(where.get("step"))
        best[metric] = Best(new, _number(where.get("epoch")), None if step is None else int(step))


Key = Callable[[RunSummary], Any]
_COLUMNS: dict[
    str, tuple[Key, bool]
] = {  # what `--sort` takes beside metrics: the key, and whether the largest is first
    "run": (lambda run: str(run.path), False),
    "state": (lambda run: run.state, False),
    "step": (lambda run: run.step, True),
    "epoch": (lambda run: run.epoch, True),
    "epochs": (lambda run: run.epochs, True),
    "loss": (lambda run: _number(run.loss), False),
    "k-NN": (lambda run: run.best_knn_top1_pct, True),
    "images/s": (lambda run: run.images_per_s, True),
    "ranks": (lambda run: run.ranks, True),
    "last row": (lambda run: run.age_s, False),
}
_COLUMNS |= {
    other: _COLUMNS[name]
    for other, name in {
        "knn": "k-NN",
        "best_knn_top1_pct": "k-NN",
        "images_per_s": "images/s",
        "last_row": "last row",
        "age_s": "last row",
        "path": "run",
    }.items()
}


def metrics_of(sort: str | None, best: Sequence[str]) -> list[str]:
    """The metrics whose best values `--sort` and `--best` need: a name that is no column is one."""
    by = [] if sort is None or sort in _COLUMNS else [sort]
    return list(dict.fromkeys([*best, *by]))


def in_order(runs: Sequence[RunSummary], sort: str) -> list[RunSummary]:
    """The runs by a column or by the best value of a metric, the best first, those without one last."""
    key, is_largest_first = _COLUMNS.get(sort, (lambda run: run.best[sort].value, better(sort) == "higher"))
    known = [run for run in runs if (run.best.get(sort) if sort not in _COLUMNS else key(run)) is not None]
    others = [run for run in runs if run not in known]
    return sorted(known, key=key, reverse=is_largest_first) + others


def require_metrics(runs: Sequence[RunSummary], metrics: Sequence[str]) -> None:
    """Raises UsageError for a metric that none of the runs has, with the nearest name that they have."""
    for metric in metrics:
        if runs and not any(metric in run.best for run in runs):
            names = {name for run in runs for name in _names(RunFiles(run.path))}
            near = get_close_matches(metric, [*names, *_COLUMNS], 1)
            listed = ", ".join(sorted(names)) or "none"
            raise UsageError(
                f"no run has a metric {metric}: " + (f"did you mean {near[0]}?" if near else f"there are {listed}")
            )


def _names(files: RunFiles) -> set[str]:
    """The metrics in the rows and results of a run."""
    tables = [*files.rows(), *(_table(result.get("results")) for result in files.results())]
    return {name for table in tables for name, value in table.items() if is_number(value)}


def as_json(runs: Sequence[RunSummary]) -> str:
    """A JSON list of objects, one per run. A loss that was not finite is null."""
    tables = [{**asdict(run), "path": str(run.path), "loss": _number(run.loss)} for run in runs]
    return json.dumps(tables, indent=1)


def as_csv(runs: Sequence[RunSummary], metrics: Sequence[str]) -> str:
    """One line per run with every digit, below a line of names. What is not known is empty; tags are joined by `;`, and
    so are starts, each as STEP:RANKS.

    After the columns of `as_json` come the best accuracy of each evaluation, and for each of `metrics` its best value
    and the epoch of that.
    """
    tables = []
    for run in runs:
        starts = ";".join(f"{_or_empty(start['step'])}:{_or_empty(start['ranks'])}" for start in run.starts)
        table = {**vars(run), "starts": starts, "tags": ";".join(run.tags)}
        evaluations, best = table.pop("evaluations"), table.pop("best")
        table |= {f"best {name}": value for name, value in evaluations.items()}
        for metric in metrics:
            found = best.get(metric)
            table |= {f"best {metric}": found and found.value, f"best {metric}: epoch": found and found.epoch}
        tables.append(table)
    own = [name for name in RunSummary.__dataclass_fields__ if name not in ("evaluations", "best")]
    names = dict.fromkeys([*own, *(name for table in tables for name in table)])
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(tables)
    return text.getvalue()


def as_table(runs: Sequence[RunSummary], root: Path, width: int, metrics: Sequence[str] = ()) -> str:
    """One line per run. Columns are left out and names shortened until a line fits into `width` characters; the best
    values of `metrics` are left out last. The column of ranks is there if a run had several."""
    columns = {
        "run": [
            printable(os.path.relpath(run.path, root) if run.path != root else root.resolve().name) for run in runs
        ],
        "state": [f"{run.state or '?'}{f' ({run.exit_code})' if run.state == 'failed' else ''}" for run in runs],
        "epoch": [_of_total(run) for run in runs],
        "loss": [_text(LOSS, run.loss) for run in runs],
        "k-NN %": [_text(KNN, run.best_knn_top1_pct) for run in runs],
        "images/s": [_text(SPEED, run.images_per_s) for run in runs],
        "ranks": [_ranks(run) for run in runs],
        "last row": ["" if run.age_s is None else _ago(run.age_s) for run in runs],
    }
    if not any(had_several_ranks(run) for run in runs):
        del columns["ranks"]
    bests = {f"best {metric}": [_best_text(metric, run.best.get(metric)) for run in runs] for metric in metrics}
    columns |= bests
    sizes = {name: max(map(len, [name, *entries])) for name, entries in columns.items()}
    dropped = ("images/s", "ranks", "last row", "loss", "k-NN %", "epoch", "state", *reversed(bests))
    for name in (name for name in dropped if name in sizes):
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


def had_several_ranks(run: RunSummary) -> bool:
    """Whether the run had several ranks at any time."""
    return any((start["ranks"] or 1) > 1 for start in run.starts)


def _ranks(run: RunSummary) -> str:
    """Such as "16 (2 nodes) -> 8": the numbers of ranks of the last starts, the newest last."""
    texts = []
    for start in run.starts:
        nodes = f" ({start['nodes']} nodes)" if (start["nodes"] or 1) > 1 else ""
        texts.append(f"{'?' if start['ranks'] is None else start['ranks']}{nodes}")
    different = [text for place, text in enumerate(texts) if place == 0 or text != texts[place - 1]]
    return " -> ".join([*(["…"] if len(different) > _MOST_STARTS else []), *different[-_MOST_STARTS:]])


def _or_empty(value: int | None) -> str:
    return "" if value is None else str(value)


def _best_accuracies(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    best: dict[str, float] = {}
    for result in results:
        for name, value in _table(result.get("results")).items():
            accuracy = _number(value)
            if name.endswith("/top1_pct") and accuracy is not None:
                best[name] = max(accuracy, best.get(name, accuracy))
    return best


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


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
    return number(run.epoch) if run.epochs is None else f"{number(run.epoch)} / {number(run.epochs)}"


def _text(metric: str, value: float | None) -> str:
    return "" if value is None else measured(metric, value)


def _best_text(metric: str, best: Best | None) -> str:
    """Such as "71.3 after 8 epochs"."""
    if best is None:
        return ""
    return measured(metric, best.value) + ("" if best.epoch is None else f" {after(best.epoch)}")


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
