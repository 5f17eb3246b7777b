"""Plots as SVG that belongs to the page: text stays text, and colors are the page's own, light or dark.

matplotlib draws with colors that stand for the page's CSS variables and are replaced by them afterwards.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sslrun.report.html import Html, escape

RUN_COLORS = 6  # --run-0 ... of the style sheet; the seventh run has the first one's again, and a letter of its own
CLASS_COLORS = 10  # --class-0 ...
MARKERS = "o^sDv"  # each class has one beside its color, so that those who see fewer colors tell them apart too
MOST_POINTS = 300  # of a line

_INK, _SOFT, _LINE = "#010203", "#020304", "#030405"
_VARIABLES = {_INK: "currentColor", _SOFT: "var(--soft)", _LINE: "var(--line)"}
_VARIABLES |= {f"#0501{number:02x}": f"var(--run-{number})" for number in range(RUN_COLORS)}
_VARIABLES |= {f"#0502{number:02x}": f"var(--class-{number})" for number in range(CLASS_COLORS)}
_LONG = re.compile(r"\d+\.\d{3,}")  # of a place: hundredths of a point will do
_FONT = 8.5  # points
_POINT_PX = 96 / 72  # matplotlib's points in CSS pixels


@dataclass(frozen=True)
class Line:
    """A curve with a name at its end.

    Attributes:
        x, y: its points, in the order of x.
        label: at its end.
        color: number of a run's color.
    """

    x: Sequence[float]
    y: Sequence[float]
    label: str
    color: int


def lines(
    drawn: Sequence[Line],
    *,
    name: str,
    alt: str,
    x_label: str,
    x_range: tuple[float, float] | None = None,
    is_log: bool = False,
    has_dots: bool = False,
    has_zero: bool = False,
) -> Html:
    """Curves over a common axis, each with its label at its end.

    Args:
        drawn: at least one, each with at least one point.
        name: unique on the page; of letters and digits.
        alt: what is to be seen, in words.
        x_label: what x counts.
        x_range: what is shown of x; all that there is where it is not given.
        is_log: whether y is logarithmic; for values above 0.
        has_dots: whether the points are marked.
        has_zero: whether y begins at 0.
    """
    from matplotlib.ticker import NullLocator

    right = max(_width(line.label) for line in drawn) + 4
    figure, axes = _figure(266, 162, left=30, right=right, bottom=27, top=13)
    for line in drawn:
        x, y = _thinned(np.asarray(line.x, float), np.asarray(line.y, float))
        style: dict[str, Any] = {"marker": "o", "markersize": 3.2} if has_dots and len(x) <= 40 else {}
        if len(x) == 1:
            style = {"marker": "o", "markersize": 4}
        axes.plot(x, y, color=f"#0501{line.color % RUN_COLORS:02x}", linewidth=1.5, solid_capstyle="round", **style)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.02, y=0.12)
    first, last = x_range or (min(line.x[0] for line in drawn), max(line.x[-1] for line in drawn))
    if last > first:
        axes.set_xlim(first - 0.02 * (last - first), last + 0.02 * (last - first))
    if has_zero:
        axes.set_ylim(0, 1.12 * max(max(line.y) for line in drawn) or 1)
    axes.locator_params(axis="x", nbins=6, min_n_ticks=2, integer=last - first >= 2)
    if not is_log:
        axes.locator_params(axis="y", nbins=5)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5), useMathText=False)
        axes.yaxis.get_offset_text().set_color(_SOFT)
    axes.set_xlabel(x_label, color=_SOFT, loc="right", labelpad=2)
    _end_labels(axes, drawn)
    return _svg(figure, name, alt)


def scatter(
    points: np.ndarray, groups: np.ndarray | None, labels: Sequence[str], *, name: str, alt: str, has_names: bool
) -> Html:
    """Points of a map without axes.

    Args:
        points: (n, 2).
        groups: (n,) numbers of the classes that color and shape them, each at least once; None where there are none.
        labels: names of the classes.
        name: unique on the page; of letters and digits.
        alt: what is to be seen, in words.
        has_names: whether a class's name stands in the middle of its points.
    """
    extent = np.ptp(points, axis=0).clip(1e-9)
    figure, axes = _figure(302, 302 * float(np.clip(extent[1] / extent[0], 0.6, 1.0)))
    axes.set_axis_off()
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.04)
    if groups is None:
        axes.plot(*points.T, "o", markersize=3, color=f"#0502{0:02x}", markeredgewidth=0, alpha=0.75)
        return _svg(figure, name, alt)
    for group in range(len(labels)):
        color, marker = f"#0502{group % CLASS_COLORS:02x}", _shape(group)
        axes.plot(*points[groups == group].T, marker, markersize=3.4, color=color, markeredgewidth=0, alpha=0.8)
    if has_names:
        _names(axes, np.stack([np.median(points[groups == group], axis=0) for group in range(len(labels))]), labels)
    return _svg(figure, name, alt)


def marker(group: int) -> Html:
    """A class's dot as `scatter` draws it, for a key."""
    shapes = {
        "o": '<circle cx="5" cy="5" r="4"/>',
        "^": '<path d="M5 1L9 9H1z"/>',
        "s": '<path d="M1.5 1.5h7v7h-7z"/>',
        "D": '<path d="M5 0L10 5L5 10L0 5z"/>',
        "v": '<path d="M5 9L1 1H9z"/>',
    }
    shape = shapes[_shape(group)]
    style = f"fill: var(--class-{group % CLASS_COLORS})"
    return Html(f'<svg viewBox="0 0 10 10" width="10" height="10" aria-hidden="true" style="{style}">{shape}</svg>')


def _shape(group: int) -> str:
    """A class's marker: the next class has another, and so has the next one with the same color."""
    return MARKERS[(group + group // CLASS_COLORS) % len(MARKERS)]


def _figure(
    width: float, height: float, left: float = 0, right: float = 0, bottom: float = 0, top: float = 0
) -> tuple[Any, Any]:
    """A figure and its axes, in the page's style. Sizes and margins are in points.

    Given margins, because matplotlib's own layout draws everything three times over.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "axes.edgecolor": _LINE,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.spines.left": False,
        "font.size": _FONT,
        "text.color": _INK,
        "xtick.color": _LINE,
        "xtick.labelcolor": _SOFT,
        "ytick.labelcolor": _SOFT,
        "ytick.major.size": 0,
    }
    with rc_context(style):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")
        box = left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height
        axes = figure.add_axes(box, facecolor="none")
    return figure, axes


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over equal stretches where there are more points than can be seen; first and last point stay."""
    if len(x) <= MOST_POINTS:
        return x, y
    places = np.linspace(1, len(x) - 1, MOST_POINTS - 1).astype(int)
    starts = np.unique(np.concatenate([[0], places]))
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def _end_labels(axes: Any, drawn: Sequence[Line]) -> None:
    """Each label to the right of its line's end, or as near to that as it takes for none to cover another."""
    ends = axes.transData.transform([(line.x[-1], line.y[-1]) for line in drawn])
    half = np.array([_width(line.label) / 2 for line in drawn])
    places = _apart(ends + np.stack([half, 0 * half], axis=1), 2 * half) - np.stack([half, 0 * half], axis=1)
    for line, place in zip(drawn, axes.transData.inverted().transform(places), strict=True):
        _name(axes, line.label, place, f"#0501{line.color % RUN_COLORS:02x}", ha="left", xytext=(5, 0))


def _names(axes: Any, places: np.ndarray, labels: Sequence[str]) -> None:
    """The labels at (C, 2) places, or as near to them as it takes for none to cover another."""
    axes.apply_aspect()
    centers = _apart(axes.transData.transform(places), np.array([_width(label) for label in labels]))
    for group, (label, place) in enumerate(zip(labels, axes.transData.inverted().transform(centers), strict=True)):
        _name(axes, label, place, f"#0502{group % CLASS_COLORS:02x}", ha="center", xytext=(0, 0))


def _name(axes: Any, label: str, place: np.ndarray, color: str, ha: str, xytext: tuple[float, float]) -> None:
    """A direct label. The style sheet knows it by its id and gives it a halo."""
    axes.annotate(
        label,
        place,
        xytext=xytext,
        textcoords="offset points",
        ha=ha,
        va="center",
        color=color,
        weight="bold",
        size=_FONT,
        parse_math=False,
        annotation_clip=False,
        gid=f"name_{len(axes.texts)}",
    )


def _width(label: str) -> float:
    """About how wide a label will be, in points, in whatever font the page is read."""
    return 0.62 * _FONT * len(label) + 4


def _apart(centers: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(n, 2) centers of labels, moved up and down until none covers another. All are in points."""
    centers, height = centers.copy(), 1.2 * _FONT
    for _ in range(300):
        gap = centers[:, None] - centers[None]
        covers = (np.abs(gap[..., 0]) < (widths[:, None] + widths) / 2) & (np.abs(gap[..., 1]) < height)
        pairs = [(one, other) for one, other in np.argwhere(covers) if one < other]
        if not pairs:
            break
        for one, other in pairs:
            upper, lower = (one, other) if centers[one, 1] >= centers[other, 1] else (other, one)
            push = max(height - (centers[upper, 1] - centers[lower, 1]), 0) / 2 + 0.05
            centers[upper, 1] += push
            centers[lower, 1] -= push
    return centers


def _svg(figure: Any, name: str, alt: str) -> Html:
    """The figure as an element of the page."""
    from matplotlib import rc_context

    out = io.StringIO()
    nothing: dict[str, Any] = {key: None for key in ("Date", "Creator", "Format", "Type")}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sslrun", "path.simplify": True}):
        figure.savefig(out, format="svg", metadata=nothing)
    return Html(_themed(out.getvalue(), name, alt))


def _themed(text: str, name: str, alt: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', text)  # many plots, one page
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r'\b[dxy]="[^"]*"', lambda place: _LONG.sub(lambda found: f"{float(found[0]):.2f}", place[0]), text)
    text = re.sub(r"#0[1-5][0-9a-f]{4}\b", lambda found: _VARIABLES.get(found[0], found[0]), text)
    text = re.sub(r"\n\s*", " ", text)
    opening = text[: text.index(">")]
    width, height = (float(size) for size in re.findall(r'\b(?:width|height)="([\d.]+)pt"', opening)[:2])
    box = f'viewBox="0 0 {width:g} {height:g}"'
    size = f'width="{math.ceil(width * _POINT_PX)}" height="{math.ceil(height * _POINT_PX)}"'
    start = f'<svg {box} {size} role="img" aria-label="{escape(alt)}" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return start + text[len(opening) :]
