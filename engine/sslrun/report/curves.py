"""The metrics of training, drawn over epochs."""

from collections.abc import Sequence
from typing import NamedTuple

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


def curves(runs: Sequence[ReportedRun]) -> list[Child]:
    """A plot of each metric that any run has, and the names of the metrics that no run has."""
    x_range = 0.0, max(run.summary.epoch or 0.0 for run in runs)
    measured = {curve: [run for run in runs if run.series(curve.key)] for curve in (*CURVES, *_custom_curves(runs))}
    panels = [_panel(curve, those, x_range) for curve, those in measured.items() if those]
    missing = [curve.title for curve in CURVES if not measured[curve]]
    content: list[Child] = [element("div", panels, class_="panels")] if panels else []
    if missing:
        content.append(element("p", f"Not in {METRICS}: {', '.join(missing)}.", class_="note"))
    return content


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
    plot = plots.lines(lines, name="spectrum", alt=alt, x_label="number", is_log=True)
    subtitle = "of the features, in descending order; a steep fall means that few directions are used"
    return _figure("Singular values", subtitle, plot)


def _panel(curve: Curve, runs: Sequence[ReportedRun], x_range: tuple[float, float]) -> Html:
    is_alone = len(runs) == 1 and runs[0].letter == ""
    form = percent if curve.is_percent else number
    lines, descriptions = [], []
    for run in runs:
        x, y = zip(*run.series(curve.key), strict=True)
        last = form(y[-1]).replace(" %", "")
        lines.append(plots.Line(x, y, last if is_alone else f"{run.letter} {last}", run.color))
        name = "" if is_alone else f"{run.letter}: "
        best = f", highest {form(max(y))}" if curve.is_better_high and max(y) > y[-1] else ""
        descriptions.append(f"{name}{form(y[0])} at epoch {number(x[0])}, {form(y[-1])} at epoch {number(x[-1])}{best}")
    plot = plots.lines(
        lines,
        name=curve.key.replace("/", "-").replace("_", "-"),
        alt=f"{curve.title} over epochs. {'; '.join(descriptions)}.",
        x_label="epoch",
        x_range=x_range,
        has_dots=curve.is_better_high,
        has_zero=curve.has_zero,
    )
    return _figure(f"{curve.title}, %" if curve.is_percent else curve.title, curve.subtitle, plot)


def _figure(title: str, subtitle: str, plot: Html) -> Html:
    caption = element("figcaption", element("h3", title), element("p", subtitle))
    return element("figure", caption, plot, class_="panel")
