"""The results of `sslrun eval` in a run folder: eval/*.json."""

from collections.abc import Sequence
from typing import Any

from sslrun.glossary import meaning
from sslrun.number_format import counted, duration, number
from sslrun.report.curves import singular_values
from sslrun.report.html import Child, Html, element, table
from sslrun.report.recipe import plain_text
from sslrun.report.reported_run import ReportedRun
from sslrun.runtime.run_files import is_number

MOST_ROWS = 200  # of a table of settings


def evaluations(runs: Sequence[ReportedRun]) -> list[Child]:
    """A table with one row per result, and below it the tables that the results contain."""
    rows, settings = [], []
    for run in runs:
        for result in run.results:
            metrics = result.get("results")
            metrics = metrics if isinstance(metrics, dict) else {}
            rows.append(
                [
                    _kind(run, result),
                    _numbers(metrics),
                    _weights(result),
                    _images(result.get("data")),
                    element("span", str(result.get("time", "–"))[:16].replace("T", " "), class_="when"),
                    duration(result["wall_s"]) if is_number(result.get("wall_s")) else "–",
                    element("code", result.get("command", "–"), class_="command"),
                ]
            )
            settings += [_settings(_kind(run, result), name, value) for name, value in metrics.items()]
    if not rows:
        command = element("code", "sslrun eval knn|linear|finetune|spectrum RUN")
        text = ["None yet. ", command, " evaluates an encoder and writes its result to the run folder."]
        return [element("p", text, class_="note")]
    head = ("evaluation", "result", "weights", "images", "date", "duration", "command")
    spectrum = singular_values(runs)
    return [table(head, rows), element("div", spectrum, class_="panels") if spectrum else None, settings]


def _kind(run: ReportedRun, result: dict[str, Any]) -> str:
    return f"{run.letter} {result.get('kind', '?')}".strip()


def _numbers(metrics: dict[str, Any]) -> Html:
    """The numbers and texts of a result, without its lists and tables."""
    items = [
        element(
            "div",
            element("dt", name, title=meaning(name)),
            element("dd", value if isinstance(value, str) else number(value)),
        )
        for name, value in metrics.items()
        if is_number(value) or isinstance(value, str)
    ]
    return element("dl", items, class_="result") if items else element("span", "–")


def _weights(result: dict[str, Any]) -> str:
    epoch, weights = result.get("epoch"), str(result.get("weights", "–"))
    return f"{weights} (epoch {number(epoch)})" if epoch is not None and is_number(epoch) else weights


def _images(data: Any) -> str:
    if not isinstance(data, dict):
        return "–"
    return "; ".join(f"{key}: {data[key]}" for key in ("train", "test") if key in data) or "–"


def _settings(kind: str, name: str, value: Any) -> Html | None:
    """A folded table of the settings that were tried and their results; None if the value is not a list of tables."""
    if not (isinstance(value, list) and value and all(isinstance(row, dict) for row in value)):
        return None
    columns = list(dict.fromkeys(column for row in value for column in row))
    rows = [[plain_text(row.get(column)) for column in columns] for row in value[:MOST_ROWS]]
    more = f", the first {MOST_ROWS}" if len(value) > MOST_ROWS else ""
    title = f"{kind}: {name}, {counted(len(value), 'row')}{more}"
    return element("details", element("summary", title), table(columns, rows))
