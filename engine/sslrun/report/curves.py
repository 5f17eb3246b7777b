"""The metrics of training, drawn over epochs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sslrun.glossary import meaning
from sslrun.number_format import number, percent
from sslrun.report import plots
from sslrun.report.html import Child, Html, element
from sslrun.report.reported_run import ReportedRun
from sslrun.runtime.run_files import KNN, LOSS, METRICS, RATE, SPEED, WAIT, is_number


class Curve(NamedTuple):
    """A metric and how it is drawn.

    Attributes:
        key: in the rows of metrics.jsonl.
        title: of the plot.
        subtitle: what the metric is.
        is_percent: whether its unit is per cent.
        is_better_high: whether higher is better; such a curve has dots, and its highest value is in the description.
        has_zero: whether the y axis begins at 0.
    """

    key: str
    title: str
    subtitle: str
    is_percent: bool = False
    is_better_high: bool = False
    has_zero: bool = False


CURVES = (
    Curve(LOSS, "Loss", "training loss, mean over each logging interval"),
    Curve("val/loss", "Held-out loss", "the method's loss on images that are not trained on"),
    Curve(KNN, "k-NN accuracy", "held-out images, classified by their nearest training images", True, True),
    Curve(
        "probe/top1_pct",
        "Online probe accuracy",
        "held-out images, classified by a linear classifier that is fitted to the features at each measurement",
        True,
        True,
    ),
    Curve("spectrum/rankme", "RankMe", "effective number of dimensions that the features use", is_better_high=True),
    Curve("train/feature_std", "Spread of the embeddings", "1: spread evenly, 0: collapsed"),
    Curve(RATE, "Learning rate", "of the first parameter group"),
    Curve("train/momentum", "Momentum", "EMA decay of the momentum teacher"),
    Curve(SPEED, "Images per second", "training only, without measurements and checkpoints", has_zero=True),
    Curve(
        WAIT,
        "Waiting for data",
        "share of the training time that is spent waiting for a batch",
        is_percent=True,
        has_zero=True,
    ),
)

# First parts of the names of the engine's own metrics. Metrics with another one are a user's monitors'.
ENGINE_GROUPS = {"train", "val", "test", "knn", "probe", "spectrum", "speed", "data", "mem", "compile"}


# What the x axis may show: its name, the label beside the choice, the keys of rows.
AXES = (("epoch", "epochs"), ("step", "steps"), ("wall", "wall-clock time"))
UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
MOST_CUSTOM = 40  # curves of a user's own monitors
FEWEST_POINTS = 60  # of a curve, however many runs are shown


def curves(runs: Sequence[ReportedRun]) -> list[Child]:
    """A plot of each metric that any run has, and the names of the metrics that no run has."""
    custom = _custom_curves(runs)
    measured = {curve: [run for run in runs if run.series(curve.key)] for curve in (*CURVES, *custom[:MOST_CUSTOM])}
    ranges = {axis: _range(runs, axis) for axis, _ in AXES}
    panels = [_panel(curve, those, ranges) for curve, those in measured.items() if those]
    missing = [curve.title for curve in CURVES if not measured[curve]]
    content: list[Child] = []
    if panels:
        shown = [(axis, label) for axis, label in AXES if ranges[axis]]
        content += [_choice(shown), element("div", panels, class_="panels")]
    if missing:
        content.append(element("p", f"Not in {METRICS}: {', '.join(missing)}.", class_="note"))
    if len(custom) > MOST_CUSTOM:
        content.append(element("p", f"{METRICS} has {len(custom) - MOST_CUSTOM} more custom metrics.", class_="note"))
    return content


def _choice(axes: Sequence[tuple[str, str]]) -> Html:
    """Buttons that choose the x axis of all curves; the style sheet shows the chosen plots."""
    items = [
        element(
            "label",
            element("input", type="radio", name="axis", value=axis, id=f"axis-{axis}", checked=axis == "epoch"),
            f" {label}",
        )
        for axis, label in axes
    ]
    return element("fieldset", element("legend", "Horizontal axis: "), items, class_="axes")


def _range(runs: Sequence[ReportedRun], axis: str) -> tuple[float, float] | None:
    """Of an axis, over all metrics of all runs; None if no row has it."""
    key = {"wall": "wall_s"}.get(axis, axis)
    found = [float(row[key]) for run in runs for row in run.rows if is_number(row.get(key))]
    return (min(0.0, *found), max(found)) if found else None


def _custom_curves(runs: Sequence[ReportedRun]) -> list[Curve]:
    """A curve for each metric of a user's own monitors."""
    names = {name for run in runs for row in run.rows for name in row}
    custom = sorted(name for name in names if "/" in name and name.split("/")[0] not in ENGINE_GROUPS)
    return [Curve(name, name, "measured by a custom monitor", name.endswith("_pct"), True) for name in custom]


def singular_values(runs: Sequence[ReportedRun]) -> Html | None:
    """A plot of the newest spectrum of each run; None if no spectrum was measured."""
    lines = []
    for run in runs:
        spectra = [result.get("results") for result in run.results if result.get("kind") == "spectrum"]
        values = spectra[-1].get("singular_values") if spectra and isinstance(spectra[-1], dict) else None
        positive = [v for v in values if is_number(v) and v > 0] if isinstance(values, list) else []
        if positive:
            lines.append(plots.Line(range(1, len(positive) + 1), positive, run.letter, run.color))
    if not lines:
        return None
    alt = "Singular values of the features in descending order, on a logarithmic axis."
    plot = plots.lines(lines, alt=alt, x_label="number", axis="number", is_log=True)
    subtitle = "of the features, in descending order; a steep fall means that few directions are used"
    return _figure("Singular values", subtitle, plot)


def _panel(curve: Curve, runs: Sequence[ReportedRun], ranges: dict[str, tuple[float, float] | None]) -> Html:
    is_alone = len(runs) == 1 and runs[0].letter == ""
    form = percent if curve.is_percent else number
    most = max(FEWEST_POINTS, min(plots.MOST_POINTS, 4 * plots.MOST_POINTS // len(runs)))
    drawn, data, descriptions = [], [], []
    for run in runs:
        points = run.points(curve.key)
        points = dict(zip(points, plots.thinned(list(points.values()), most), strict=True))
        y, x = points["y"], points["epoch"]
        last = form(y[-1]).replace(" %", "")
        drawn.append((points, last if is_alone else f"{run.letter} {last}", run.color))
        name = "" if is_alone else f"{run.letter}: "
        best = f", highest {form(y.max())}" if curve.is_better_high and y.max() > y[-1] else ""
        descriptions.append(f"{name}{form(y[0])} at epoch {number(x[0])}, {form(y[-1])} at epoch {number(x[-1])}{best}")
        columns = {f"data_{place}": " ".join(map(_short, values)) for place, values in points.items()}
        color = run.color % plots.RUN_COLORS
        data.append(element("data", value="", data_name=run.letter, data_color=color, hidden=True, **columns))
    figures = []
    for axis, label in AXES:
        x_range, scale = ranges[axis], 1
        if axis == "wall" and x_range:
            scale, unit = next((each for each in UNITS if x_range[1] >= 2 * each[0]), UNITS[-1])
            label = f"wall-clock time, {unit}"
        kept = [(points, *rest, np.isfinite(points[axis])) for points, *rest in drawn]
        lines = [
            plots.Line(points[axis][some] / scale, points["y"][some], text, color)
            for points, text, color, some in kept
            if some.any()
        ]
        if not lines or x_range is None:
            continue
        figures.append(
            plots.lines(
                lines,
                alt=f"{curve.title} over {label}. {'; '.join(descriptions)}.",
                x_label=label.removesuffix("s") if axis != "wall" else label,
                axis=axis,
                x_range=(x_range[0] / scale, x_range[1] / scale),
                x_scale=scale,
                has_dots=curve.is_better_high,
                has_zero=curve.has_zero,
            )
        )
    unit = " %" if curve.is_percent else ""
    title = f"{curve.title}, %" if curve.is_percent else curve.title
    return _figure(title, curve.subtitle, [*figures, *data], meaning(curve.key), data_unit=unit)


def _short(value: float) -> str:
    """A number for the reader of a curve; "-" if there is none."""
    return f"{value:.6g}" if np.isfinite(value) else "-"


def _figure(title: str, subtitle: str, content: Child, tooltip: str | None = None, **attributes: str) -> Html:
    caption = element("figcaption", element("h3", title, title=tooltip), element("p", subtitle))
    return element("figure", caption, content, class_="panel", **attributes)
