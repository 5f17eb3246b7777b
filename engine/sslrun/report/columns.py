"""Parts of several runs beside each other: one column per run, and equal parts once."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from sslrun.report.html import Child, Html, element, joined
from sslrun.report.reported_run import ReportedRun
from sslrun.report.words import breakable, letter

T = TypeVar("T")


def or_reason(function: Callable[[], T]) -> T | Html:
    """The result of the function, or a sentence that says why there is none, so that the rest is still reported."""
    try:
        return function()
    except (ValueError, OSError, RuntimeError) as error:  # UsageError, RunFailed, a GPU without free memory
        return element("p", f"Left out: {str(error).partition(chr(10))[0]}.", class_="note")


def columns(parts: Sequence[tuple[ReportedRun, Child]]) -> list[Child]:
    """Each run's part in a column of its own. What all parts begin or end with stands once above or below them, and
    runs whose parts are equal share a column."""
    items = [[joined([each]) for each in part] if isinstance(part, list) else [joined([part])] for _, part in parts]
    above, below = (0, 0) if len(parts) == 1 else _shared(items)
    alike: dict[str, list[ReportedRun]] = {}
    for (run, _), each in zip(parts, items, strict=True):
        alike.setdefault("".join(each[above : len(each) - below]), []).append(run)
    articles = [element("article", heading(runs, len(parts)), Html(part)) for part, runs in alike.items()]
    first = items[0]
    return [first[:above], side_by_side(articles), first[len(first) - below :]]


def _shared(items: Sequence[list[Html]]) -> tuple[int, int]:
    """How many parts at the beginning and at the end are the same in all lists; 0 if all are the same."""
    least = min(len(each) for each in items)
    above = next((place for place in range(least) if len({each[place] for each in items}) > 1), least)
    if above == least:
        return 0, 0
    rest = least - above - 1
    below = next((place for place in range(rest) if len({each[-1 - place] for each in items}) > 1), rest)
    return above, below


def side_by_side(articles: Sequence[Html]) -> Html:
    """Columns of equal widths; a narrow screen shows one below the other."""
    return element("div", articles, class_="side-by-side", style=f"--columns: {len(articles)}")


def heading(runs: Sequence[ReportedRun], total: int) -> Html | None:
    """The letters of the runs that a part belongs to, and what they have in common; none in a report of one run."""
    if not runs[0].letter:
        return None
    if len(runs) == 1:
        return element("h3", letter(runs[0]), " ", element("span", breakable(runs[0].name)))
    text = "the same in all runs" if len(runs) == total else "the same"
    return element("h3", [[letter(run), " "] for run in runs], element("span", text, class_="note"))
