"""What runs were made with: their recipes, the differences between these, and their environment."""

import json
from collections.abc import Sequence
from typing import Any

from sslrun.config.diff import differences
from sslrun.config.dump import inline
from sslrun.config.explain import DEFAULT
from sslrun.config.node import Node, plain, show
from sslrun.config.schema_reader import Setting
from sslrun.number_format import counted, number
from sslrun.report.html import Child, Html, element, table
from sslrun.report.reported_run import ReportedRun
from sslrun.report.words import letter, prefix, state
from sslrun.runs import RunSummary, had_several_ranks
from sslrun.runtime.run_files import CONFIG, ENVIRONMENT, content_of, is_number

FIRST = ("ranks", "host", "time", "gpus", "folder")  # entries that are shown even if all runs have the same


def recipe_differences(runs: Sequence[ReportedRun]) -> list[Child]:
    """A table of the keys whose values differ from the first run's."""
    readable = [run for run in runs if run.config is not None]
    if len(readable) < 2:
        return [element("p", "Left out: there are fewer than two readable recipes to compare.", class_="note")]
    first, *others = readable
    rows: dict[str, dict[str, Html]] = {}
    for other in others:
        assert first.config is not None and other.config is not None
        for old, new, is_moved in differences(first.config, other.config):
            if old.key[:1] != ("work_dir",):
                # An element that only the other run has gets its own row: the first may have another at its index.
                is_added = old.node is None and isinstance(new.key[-1], int)
                name = f"{show(new.key)}, added" if is_added else show(old.key)
                name += ", place" if is_moved else ""
                values = [_place(side) if is_moved else _value(side.node) for side in (old, new)]
                rows.setdefault(name, {first.letter: values[0]})[other.letter] = values[1]
    if not rows:
        return [element("p", "The recipes are the same. A key that is not set counts with its default.")]
    cells = [
        [element("code", key), *(row.get(each.letter, row[first.letter]) for each in readable)]
        for key, row in rows.items()
    ]
    text = (
        f"{counted(len(rows), 'key')} of the resolved recipes {'differs' if len(rows) == 1 else 'differ'}. A key that "
        "is not set counts with its default."
    )
    return [element("p", text), table(["key", *(letter(each) for each in readable)], cells, class_="differences")]


def recipe(run: ReportedRun) -> list[Child]:
    """The resolved recipe, as the run folder holds it."""
    try:
        text = content_of(run.path / CONFIG).decode(errors="replace")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return [element("p", f"Left out: {CONFIG}: {reason}.", class_="note")]
    code = element("pre", element("code", text), tabindex=0)
    return [element("details", element("summary", f"{CONFIG}, {counted(len(text.splitlines()), 'line')}"), code)]


def environments(runs: Sequence[ReportedRun]) -> list[Child]:
    """The runs' states, and the versions and hardware of their last starts; what does not differ is folded."""
    entries = [_environment(run) for run in runs]
    keys = list(dict.fromkeys(key for each in entries for key in each))
    text = {key: [plain_text(each.get(key)) for each in entries] for key in keys}
    first = [key for key in keys if key in FIRST or len(set(text[key])) > 1]
    rest = [key for key in keys if key not in first]
    content: list[Child] = [_entries(runs, {key: text[key] for key in first}, state_row=[state(run) for run in runs])]
    content += [
        element("p", f"{prefix(run)}{ENVIRONMENT} is missing.", class_="note") for run in runs if not run.environment
    ]
    if rest:
        same = ", equal in all runs" if len(runs) > 1 else ""
        summary = element("summary", f"{ENVIRONMENT}: {counted(len(rest), 'line')}{same}")
        folded: dict[str, str | Html] = {key: text[key][0] for key in rest}
        content.append(element("details", summary, _pairs(folded)))
    return content


def _environment(run: ReportedRun) -> dict[str, Any]:
    status: dict[str, Any] = {key: run.state[key] for key in ("time", "host") if key in run.state}
    known = {key: value for key, value in run.environment.items() if value not in (None, [], "")}
    ranks = {"ranks": _ranks(run.summary)} if had_several_ranks(run.summary) else {}
    return {**ranks, **known, **status, "folder": str(run.path)}


def _ranks(run: RunSummary) -> str:
    """Such as "16 on 2 nodes, then 8 from step 1,204 on"."""
    texts: list[str] = []
    for start in run.starts:
        several = f" on {start['nodes']} nodes" if (start["nodes"] or 1) > 1 else ""
        since = f" from step {start['step']:,} on" if texts and start["step"] is not None else ""
        texts.append(f"{plain_text(start['ranks'])}{several}{since}")
    return ", then ".join(texts)


def _entries(runs: Sequence[ReportedRun], entries: dict[str, list[str]], state_row: list[Html]) -> Html:
    """A list for one run, a table with a column per run for several."""
    if len(runs) == 1:
        single: dict[str, str | Html] = {key: values[0] for key, values in entries.items()}
        return _pairs({"state": state_row[0], **single})
    rows: list[list[Child]] = [["state", *state_row]]
    rows += [[key, *values] for key, values in entries.items()]
    return table(["", *(letter(run) for run in runs)], rows, class_="differences")


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


def _value(node: Node | None) -> Html:
    """A value of a recipe, and whether it is the code's default."""
    if node is None:
        return element("span", "not set", class_="note")
    value = element("code", inline(plain(node)))
    is_default = node.where.layer.source == DEFAULT
    return element("span", value, element("small", " default") if is_default else None)


def _place(side: Setting) -> Html:
    """Where an element stands in its list, counted from 0 as in its key."""
    return element("span", f"{side.key[-1]}")
