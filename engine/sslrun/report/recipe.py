"""What runs were made with: their recipes, the differences between these, and their environment."""

import json
from collections.abc import Sequence
from typing import Any

from sslrun.config.diff import differences
from sslrun.config.dump import inline
from sslrun.config.node import Node, plain, show
from sslrun.report.header import state
from sslrun.report.html import Child, Html, element, table
from sslrun.report.number_format import counted, number
from sslrun.report.reported_run import ReportedRun
from sslrun.runtime.run_files import CONFIG, ENVIRONMENT, content_of, is_number


def recipe_differences(runs: Sequence[ReportedRun]) -> list[Child]:
    """A table of the keys whose values differ from the first run's."""
    readable = [run for run in runs if run.config is not None]
    if len(readable) < 2:
        return [element("p", "Left out: there are fewer than two readable recipes to compare.", class_="note")]
    first, *others = readable
    values: dict[str, dict[str, str]] = {}
    for other in others:
        assert first.config is not None and other.config is not None
        for old, new, is_moved in differences(first.config, other.config):
            if not is_moved and old.key[:1] != ("work_dir",):
                row = values.setdefault(show(new.key if new.node else old.key), {first.letter: _value(old.node)})
                row[other.letter] = _value(new.node)
    if not values:
        return [element("p", "The recipes are the same.")]
    rows = [
        [
            element("code", key),
            *(element("code", row.get(each.letter, row[first.letter])) for each in (first, *others)),
        ]
        for key, row in values.items()
    ]
    text = f"{counted(len(rows), 'key')} of the resolved recipes differ. A key that is not set counts with its default."
    return [element("p", text), table(["key", *(each.letter for each in (first, *others))], rows)]


def recipe(run: ReportedRun) -> list[Child]:
    """The resolved recipe, as the run folder holds it."""
    try:
        text = content_of(run.path / CONFIG).decode(errors="replace")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return [element("p", f"Left out: {CONFIG}: {reason}.", class_="note")]
    code = element("pre", element("code", text), tabindex=0)
    return [element("details", element("summary", f"{CONFIG}, {counted(len(text.splitlines()), 'line')}"), code)]


def environment(run: ReportedRun) -> list[Child]:
    """The run's state, and the versions and hardware of its last start."""
    status = {"state": state(run)} | {key: plain_text(run.state[key]) for key in ("time", "host") if key in run.state}
    content = [_pairs({**status, "folder": str(run.path)})]
    if not run.environment:
        return [*content, element("p", f"{ENVIRONMENT} is missing.", class_="note")]
    entries = {key: plain_text(value) for key, value in run.environment.items() if value not in (None, [], "")}
    return [*content, element("details", element("summary", ENVIRONMENT), _pairs(entries))]


def plain_text(value: Any) -> str:
    """A value of a JSON file as one line of text."""
    if is_number(value):
        return number(value)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return " ".join(value)
    return value if isinstance(value, str) else "–" if value is None else json.dumps(value, default=str)


def _pairs(values: dict[str, str | Html]) -> Html:
    items = [element("div", element("dt", key), element("dd", value)) for key, value in values.items()]
    return element("dl", items, class_="pairs")


def _value(node: Node | None) -> str:
    return "–" if node is None else inline(plain(node))
