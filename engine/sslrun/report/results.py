"""The results of several runs as one table, which sorts by a click on the head of a column."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sslrun.glossary import meaning
from sslrun.number_format import duration, number, percent
from sslrun.report.html import Child, element, scrollable
from sslrun.report.reported_run import PROBE, RANKME, ReportedRun
from sslrun.report.words import breakable, count_of_parameters, epochs, letter, method, speed, state
from sslrun.runtime.run_files import KNN, LOSS, SPEED, is_number


class Cell(NamedTuple):
    """A value of the table.

    Attributes:
        value: by which the column is sorted; None if there is none.
        shown: the same for a reader; None for the value as a number.
        detail: a second line.
    """

    value: float | str | None
    shown: Child = None
    detail: str | None = None


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        title: its head.
        cell: a run's value.
        is_better_high: whether the highest value is marked as the best.
        command: what measures it, for a column that no run has; None if it is shown in any case.
        metric: the metric whose meaning the head shows under the pointer; "" for none.
    """

    title: str
    cell: Callable[[ReportedRun], Cell]
    is_better_high: bool = False
    command: str | None = None
    metric: str = ""


def result_table(runs: Sequence[ReportedRun]) -> list[Child]:
    """The table, and how to measure what no run has."""
    cells = {column: [column.cell(run) for run in runs] for column in COLUMNS}
    shown = {
        column: each
        for column, each in cells.items()
        if column.command is None or any(cell.value is not None for cell in each)
    }
    head = [
        element(
            "th",
            column.title,
            scope="col",
            title=meaning(column.metric),
            data_first=None if column.is_better_high else "ascending",
        )
        for column in shown
    ]
    best = {column: _best(column, each) for column, each in shown.items()}
    rows = []
    for row, run in enumerate(runs):
        first, *others = shown
        name = element("th", letter(run), " ", _cell(shown[first][row], False), scope="row", data_value=run.letter)
        tds = [
            element(
                "td",
                _cell(shown[column][row], row in best[column]),
                data_value=_value(shown[column][row]),
                class_="best" if row in best[column] else None,
            )
            for column in others
        ]
        rows.append(element("tr", name, tds))
    table = element("table", element("thead", element("tr", head)), element("tbody", rows), class_="sortable")
    content: list[Child] = [scrollable(table, "Results", "figures")]
    missing = [column for column in cells if column not in shown]
    if missing:
        commands = [
            [", " if place else "", f"{column.title} (", element("code", column.command), ")"]
            for place, column in enumerate(missing)
        ]
        content.append(element("p", "Not measured: ", commands, ".", class_="note"))
    return content


def _best(column: Column, cells: Sequence[Cell]) -> set[int]:
    """The rows with the best value, if there are at least two different ones."""
    values = {row: cell.value for row, cell in enumerate(cells) if isinstance(cell.value, int | float)}
    if not column.is_better_high or len(set(values.values())) < 2:
        return set()
    return {row for row, value in values.items() if value == max(values.values())}


def _cell(cell: Cell, is_best: bool) -> list[Child]:
    text = cell.shown if cell.shown is not None else number(cell.value) if isinstance(cell.value, int | float) else "–"
    mark = element("span", " (best)", class_="screen-reader-only") if is_best else None
    detail = None if cell.detail is None else element("small", cell.detail)
    return [element("span", text), mark, detail]


def _value(cell: Cell) -> str:
    return "" if cell.value is None else str(cell.value)


def _run(run: ReportedRun) -> Cell:
    return Cell(run.letter, breakable(run.name))


def _knn(run: ReportedRun) -> Cell:
    """The newest k-NN of the training, and the highest one if that is another."""
    series = run.series(KNN)
    if not series:
        return Cell(None)
    best_epoch, best = max(series, key=lambda point: point[1])
    detail = f"best {_share(best)}, epoch {number(best_epoch)}" if best > series[-1][1] else None
    return Cell(series[-1][1], _share(series[-1][1]), detail)


def _share(value: float) -> str:
    """Per cent, below a heading that says so."""
    return percent(value).removesuffix(" %")


def _probe(run: ReportedRun) -> Cell:
    value = run.last(PROBE)
    return Cell(value, None if value is None else _share(value))


def _evaluated(kind: str) -> Callable[[ReportedRun], Cell]:
    """The best top-1 accuracy of an evaluation, with the epochs that its weights were trained for."""

    def cell(run: ReportedRun) -> Cell:
        found: list[tuple[float, Any]] = []
        for result in run.results:
            metrics: Any = result.get("results")
            value = metrics.get(f"{kind}/top1_pct") if isinstance(metrics, dict) else None
            if result.get("kind") == kind and is_number(value) and value is not None:
                found.append((value, result.get("epoch")))
        if not found:
            return Cell(None)
        value, epoch = max(found, key=lambda each: each[0])
        return Cell(
            value, _share(value), f"epoch {number(epoch)}" if is_number(epoch) and epoch != run.summary.epoch else None
        )

    return cell


def _rankme(run: ReportedRun) -> Cell:
    value = run.rankme
    total = run.encoder.num_features
    return Cell(value, None, None if value is None or total is None else f"of {total:,}")


def _parameters(run: ReportedRun) -> Cell:
    count = run.encoder.num_parameters
    return Cell(count, None if count is None else count_of_parameters(count))


COLUMNS = (
    Column("run", _run),
    Column("k-NN, %", _knn, True, "monitor.knn_interval", KNN),
    Column("k-NN after training, %", _evaluated("knn"), True, "sslrun eval knn RUN", KNN),
    Column("linear, %", _evaluated("linear"), True, "sslrun eval linear RUN", "linear/top1_pct"),
    Column("fine-tuned, %", _evaluated("finetune"), True, "sslrun eval finetune RUN", "finetune/top1_pct"),
    Column("online probe, %", _probe, True, "monitor.probe_interval", PROBE),
    Column("RankMe", _rankme, False, "monitor.rankme_interval", RANKME),
    Column("parameters", _parameters),
    Column("time", lambda run: Cell(run.wall_s, None if run.wall_s is None else duration(run.wall_s)), metric="wall_s"),
    Column("images/s", lambda run: Cell(speed(run)), True, metric=SPEED),
    Column("epochs", lambda run: Cell(run.summary.epoch, epochs(run)), metric="epoch"),
    Column("loss", lambda run: Cell(run.last(LOSS)), metric=LOSS),
    Column("method", lambda run: Cell(method(run), method(run))),
    Column("encoder", lambda run: Cell(run.encoder.name, run.encoder.name)),
    Column("state", lambda run: Cell(run.summary.state or "unknown", state(run))),
)
