"""What was written down while training, drawn over the epochs."""

from collections.abc import Sequence
from typing import NamedTuple

from sslrun.report import plots
from sslrun.report.figures import number, percent
from sslrun.report.html import Child, Html, element
from sslrun.report.record import Record, is_number


class Curve(NamedTuple):
    """A number of metrics.jsonl. `highest` says whether more is better, and so worth a word."""

    key: str
    title: str
    told: str
    is_percent: bool = False
    highest: bool = False
    has_zero: bool = False


CURVES = (
    Curve("train/loss", "Loss", "training loss, mean of each interval"),
    Curve("val/loss", "Held-out loss", "the method's own loss on images that are not trained on"),
    Curve("knn/top1_pct", "k-NN accuracy", "held-out images classified by their nearest training images", True, True),
    Curve(
        "probe/top1_pct",
        "Online probe",
        "held-out images classified by a linear classifier, fitted to the features each time",
        True,
        True,
    ),
    Curve("spectrum/rankme", "RankMe", "about how many directions the features use", highest=True),
    Curve("train/feature_std", "Spread of the embeddings", "1 is an even spread, 0 is collapse"),
    Curve("train/lr", "Learning rate", "of the first group of parameters"),
    Curve("train/momentum", "Momentum", "share of itself that the teacher keeps at a step"),
    Curve(
        "speed/images_per_s",
        "Images per second",
        "training alone, measurements and checkpoints left out",
        has_zero=True,
    ),
    Curve(
        "data/wait_pct",
        "Waiting for data",
        "share of the time that training waited for the next batch",
        True,
        has_zero=True,
    ),
)

ENGINE_GROUPS = {"train", "val", "test", "knn", "probe", "spectrum", "speed", "data", "mem", "compile"}


def curves_section(records: Sequence[Record]) -> list[Child]:
    """A panel for each number that any of the runs has; those that none has are named."""
    x_range = 0.0, max(record.run.epoch or 0.0 for record in records)
    curves = [*CURVES, *_of_own_monitors(records)]
    panels = [
        _panel(curve, drawn, x_range) for curve in curves if (drawn := [r for r in records if r.series(curve.key)])
    ]
    missing = [curve.title for curve in CURVES if not any(record.series(curve.key) for record in records)]
    content: list[Child] = [element("div", panels, class_="panels")] if panels else []
    if missing:
        content.append(element("p", f"Not in metrics.jsonl: {', '.join(missing)}.", class_="note"))
    return content


def _of_own_monitors(records: Sequence[Record]) -> list[Curve]:
    """A curve for each number in a group that the engine itself does not write."""
    names = {name for record in records for row in record.rows for name in row}
    own = sorted(name for name in names if "/" in name and name.split("/")[0] not in ENGINE_GROUPS)
    return [Curve(name, name, "measured by a monitor of one's own", name.endswith("_pct"), True) for name in own]


def singular_values(records: Sequence[Record]) -> Html | None:
    """The newest spectrum of each run that was measured."""
    drawn = []
    for record in records:
        measured = [result.get("results") for result in record.results if result.get("kind") == "spectrum"]
        values = measured[-1].get("singular_values") if measured and isinstance(measured[-1], dict) else None
        positive = [v for v in values if is_number(v) and v > 0] if isinstance(values, list) else []
        if positive:
            drawn.append(plots.Line(range(1, len(positive) + 1), positive, record.letter, record.color))
    if not drawn:
        return None
    alt = "Singular values of the features in falling order, logarithmic."
    plot = plots.lines(drawn, name="spectrum", alt=alt, x_label="number", is_log=True)
    return _figure(
        "Singular values", "of the features, in falling order: a steep fall means few directions are used", plot
    )


def _panel(curve: Curve, drawn: Sequence[Record], x_range: tuple[float, float]) -> Html:
    is_alone = len(drawn) == 1 and drawn[0].letter == ""
    lines, told = [], []
    for record in drawn:
        series = record.series(curve.key)
        x, y = zip(*series, strict=True)
        shown = percent if curve.is_percent else number
        last = shown(y[-1]).replace(" %", "")
        lines.append(plots.Line(x, y, last if is_alone else f"{record.letter} {last}", record.color))
        name = "" if is_alone else f"{record.letter}: "
        best = f", highest {shown(max(y))}" if curve.highest and max(y) > y[-1] else ""
        told.append(f"{name}{shown(y[0])} at epoch {number(x[0])}, {shown(y[-1])} at epoch {number(x[-1])}{best}")
    plot = plots.lines(
        lines,
        name=curve.key.replace("/", "-").replace("_", "-"),
        alt=f"{curve.title} over epochs. {'; '.join(told)}.",
        x_label="epoch",
        x_range=x_range,
        has_dots=curve.highest,
        has_zero=curve.has_zero,
    )
    return _figure(f"{curve.title}, %" if curve.is_percent else curve.title, curve.told, plot)


def _figure(title: str, told: str, plot: Html) -> Html:
    caption = element("figcaption", element("h3", title), element("p", told))
    return element("figure", caption, plot, class_="panel")
