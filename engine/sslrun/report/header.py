"""The top of a report: which runs it shows, how they stand, and their main results."""

import statistics
from collections.abc import Sequence

from sslrun.report.html import Child, Html, element, joined, table
from sslrun.report.number_format import duration, number, percent
from sslrun.report.reported_run import ReportedRun
from sslrun.runtime.run_files import KNN, LOSS, SPEED

MARKS = {"done": "✓", "running": "▸", "failed": "✗", "died": "✗", "pre-empted": "⏸", "interrupted": "⏸"}


def header(runs: Sequence[ReportedRun]) -> Html:
    """Title, state and main results; then errors and files that could not be read."""
    if len(runs) > 1:
        parts: list[Child] = [element("h1", f"{_word(len(runs))} runs compared"), _letters(runs), comparison(runs)]
    else:
        run = runs[0]
        parts = [
            element("h1", _breakable(run.name)),
            element("p", f"{_method(run)} with {_encoder(run)}, {_epochs(run)} epochs", " ", state(run), class_="lead"),
            _tiles(run),
        ]
    errors = [element("p", _prefix(run), run.summary.error, class_="alert") for run in runs if run.summary.error]
    problems = [
        element("p", f"{_prefix(run)}{name} cannot be read: {reason}.", class_="note")
        for run in runs
        for name, reason in run.problems.items()
    ]
    return element("header", element("p", "sslrun report", class_="eyebrow"), parts, errors, problems)


def state(run: ReportedRun) -> Html:
    """The run's state, as a mark and a word."""
    word, code = run.summary.state or "unknown", run.summary.exit_code
    mark = element("span", MARKS.get(word, "?"), aria_hidden="true")
    return element("span", mark, f" {word}, exit code {code}" if code else f" {word}", class_=f"state {word}")


def comparison(runs: Sequence[ReportedRun]) -> Html:
    """A table of the main results, one row per run."""
    columns = ("run", "state", "method", "encoder", "epochs", "loss", "k-NN, %", "best k-NN, %", "images/s", "time")
    rows = []
    for run in runs:
        knn = [value for _, value in run.series(KNN)]
        rows.append(
            [
                letter(run),
                state(run),
                _method(run),
                _encoder(run),
                _epochs(run),
                _or_dash(run.last(LOSS)),
                _or_dash(run.last(KNN)),
                _or_dash(max(knn) if knn else None),
                _or_dash(_speed(run)),
                "–" if run.wall_s is None else duration(run.wall_s),
            ]
        )
    return table(columns, rows, class_="figures")


def letter(run: ReportedRun) -> Html:
    """The run's letter on its color."""
    return element("span", run.letter, class_=f"letter run-{run.color % 6}")


def _tiles(run: ReportedRun) -> Html:
    """The main results of a single run, in large type."""
    tiles: list[tuple[str, str, str]] = []
    for key, name in ((KNN, "k-NN accuracy"), ("probe/top1_pct", "online probe accuracy")):
        series = run.series(key)
        if series:
            first, last = series[0][1], series[-1][1]
            gain = f"{last - first:+.1f} points since epoch {number(series[0][0])}" if len(series) > 1 else "held out"
            tiles.append((name, percent(last), gain))
    for key, name in ((LOSS, "training loss"), ("spectrum/rankme", "RankMe")):
        series = run.series(key)
        if series:
            (first_epoch, first), (_, last) = series[0], series[-1]
            tiles.append((name, number(last), f"{number(first)} at epoch {number(first_epoch)}"))
    speed = _speed(run)
    if speed is not None:
        tiles.append(("images per second", number(speed), "median of the training"))
    if run.wall_s is not None:
        tiles.append(("time", duration(run.wall_s), f"{_epochs(run)} epochs"))
    items = [
        element("div", element("dt", name), element("dd", value), element("dd", detail, class_="detail"))
        for name, value, detail in tiles
    ]
    return element("dl", items, class_="tiles")


def _letters(runs: Sequence[ReportedRun]) -> Html:
    """A list of the runs' letters and names; with their folders, if names are equal."""
    same_names = len({run.name for run in runs}) < len(runs)
    items = [
        element(
            "li",
            letter(run),
            element("span", _breakable(run.name), element("small", str(run.path)) if same_names else None),
        )
        for run in runs
    ]
    return element("ul", items, class_="runs")


def _method(run: ReportedRun) -> str:
    return str(run.value("model.type") or "–")


def _encoder(run: ReportedRun) -> str:
    kind, depth, arch, name = (run.value(f"model.backbone.{key}") for key in ("type", "depth", "arch", "name"))
    if kind is None:
        return "–"
    if name is not None:  # of timm or torchvision
        return f"{name} ({kind})"
    return f"{kind}-{depth if arch is None else arch}" if (depth or arch) else str(kind)


def _epochs(run: ReportedRun) -> str:
    done, planned = run.summary.epoch or 0.0, run.summary.epochs
    return number(done) if planned is None else f"{number(done)} of {number(planned)}"


def _speed(run: ReportedRun) -> float | None:
    speeds = [value for _, value in run.series(SPEED)]
    return statistics.median(speeds) if speeds else None


def _or_dash(value: float | None) -> str:
    return "–" if value is None else number(value)


def _prefix(run: ReportedRun) -> str:
    return f"{run.letter}: " if run.letter else ""


def _word(count: int) -> str:
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
    return words[count] if count < len(words) else str(count)


def _breakable(name: str) -> Html:
    """A recipe's name that may be broken after an underscore."""
    return Html(joined([name]).replace("_", "_<wbr>"))
