"""What was measured afterwards (eval/*.json), and what a run was made with: recipe, environment, state."""

import json
from collections.abc import Sequence
from typing import Any

from sslrun.report.curves import singular_values
from sslrun.report.figures import counted, duration, number
from sslrun.report.html import Child, Html, element, table
from sslrun.report.overview import state
from sslrun.report.record import Record, is_number

MOST_ROWS = 200  # of a grid


def results_section(records: Sequence[Record]) -> list[Child]:
    """The results of `sslrun eval`, a row for each file, and below it the tables in them."""
    rows, grids = [], []
    for record in records:
        for result in record.results:
            measured = result.get("results")
            measured = measured if isinstance(measured, dict) else {}
            rows.append(
                [
                    f"{record.letter} {result.get('kind', '?')}".strip(),
                    [_figures(measured)],
                    _where(result),
                    _samples(result.get("data")),
                    element("span", str(result.get("time", "–"))[:16].replace("T", " "), class_="when"),
                    duration(result["wall_s"]) if is_number(result.get("wall_s")) else "–",
                    element("code", result.get("command", "–"), class_="command"),
                ]
            )
            grids += [_grid(record, result, name, value) for name, value in measured.items()]
    if not rows:
        command = "bin/sslrun eval knn|linear|finetune|spectrum RUN"
        text = [
            "Nothing yet: ",
            element("code", command),
            " measures an encoder and leaves its result in the run folder.",
        ]
        return [element("p", text, class_="note")]
    head = ("what", "result", "weights", "images", "when", "took", "command")
    spectrum = singular_values(records)
    return [table(head, rows), element("div", spectrum, class_="panels") if spectrum else None, grids]


def recipe(record: Record) -> list[Child]:
    """The resolved recipe, as the run folder has it."""
    try:
        text = (record.path / "config.toml").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return [element("p", f"Left out: config.toml: {error.strerror}.", class_="note")]
    code = element("pre", element("code", text), tabindex=0)
    return [element("details", element("summary", f"config.toml, {counted(len(text.splitlines()), 'line')}"), code)]


def environment(record: Record) -> list[Child]:
    """How the run stands, and what it was last started with."""
    known = {"state": state(record)} | {
        key: _plain(record.state[key]) for key in ("time", "host") if key in record.state
    }
    found = [_pairs({**known, "folder": str(record.path)})]
    if not record.environment:
        return [*found, element("p", "env.json is not there.", class_="note")]
    told = {key: _plain(value) for key, value in record.environment.items() if value not in (None, [], "")}
    return [*found, element("details", element("summary", "env.json"), _pairs(told))]


def _pairs(values: dict[str, str | Html]) -> Html:
    items = [element("div", element("dt", key), element("dd", value)) for key, value in values.items()]
    return element("dl", items, class_="pairs")


def _figures(measured: dict[str, Any]) -> Html:
    """The single numbers of a result."""
    single = {name: value for name, value in measured.items() if is_number(value) or isinstance(value, str)}
    items = [
        element("div", element("dt", name), element("dd", value if isinstance(value, str) else number(value)))
        for name, value in single.items()
    ]
    return element("dl", items, class_="result") if items else element("span", "–")


def _where(result: dict[str, Any]) -> str:
    epoch = result.get("epoch")
    weights = str(result.get("weights", "–"))
    return weights if epoch is None or not is_number(epoch) else f"{weights} (epoch {number(epoch)})"


def _samples(data: Any) -> str:
    if not isinstance(data, dict):
        return "–"
    return "; ".join(f"{key}: {data[key]}" for key in ("train", "test") if key in data) or "–"


def _grid(record: Record, result: dict[str, Any], name: str, value: Any) -> Html | None:
    """A list of settings with what each gave, folded."""
    if not (isinstance(value, list) and value and all(isinstance(row, dict) for row in value)):
        return None
    columns = list(dict.fromkeys(column for row in value for column in row))
    rows = [[_plain(row.get(column)) for column in columns] for row in value[:MOST_ROWS]]
    more = f", the first {MOST_ROWS}" if len(value) > MOST_ROWS else ""
    title = f"{record.letter} {result.get('kind', '?')}: {name}, {counted(len(value), 'row')}{more}".strip()
    return element("details", element("summary", title), table(columns, rows))


def _plain(value: Any) -> str:
    if is_number(value):
        return number(value)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return " ".join(value)
    return value if isinstance(value, str) else "–" if value is None else json.dumps(value, default=str)
