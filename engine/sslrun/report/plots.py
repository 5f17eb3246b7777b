"""Plots as SVG elements of the page: text stays text, and colors are the style sheet's, light or dark.

matplotlib cannot draw in CSS variables: it draws in placeholder colors, each of which stands for one variable.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

from sslrun.report.html import Html, legal

RUN_COLORS = 6  # --run-0 ... of the style sheet; the seventh run has the first color again, and its own letter
CLASS_COLORS = 10  # --class-0 ...
MARKERS = "o^sDv"  # classes differ in shape as well as in color, for readers who see fewer colors
MOST_POINTS = 300  # of a line

_INK, _SOFT, _LINE = "#010203", "#020304", "#030405"
_RUNS = [f"#0501{number:02x}" for number in range(RUN_COLORS)]
_CLASSES = [f"#0502{number:02x}" for number in range(CLASS_COLORS)]
_VARIABLES = {
    _INK: "currentColor",
    _SOFT: "var(--soft)",
    _LINE: "var(--line)",
    **{color: f"var(--run-{number})" for number, color in enumerate(_RUNS)},
    **{color: f"var(--class-{number})" for number, color in enumerate(_CLASSES)},
}
_FONT = 8.5  # points
_STYLE: Any = {
    "axes.edgecolor": _LINE,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.left": False,
    "font.sans-serif": ["DejaVu Sans"],  # for the layout; the style sheet has the page's font instead
    "font.size": _FONT,
    "text.color": _INK,
    "xtick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
    "path.simplify": True,
}
_SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        x: x of its points, ascending.
        y: y of its points.
        label: text at the curve's end.
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
    """A plot of curves over a common axis, each with its label at its end.

    Args:
        drawn: at least one curve, each with at least one point.
        name: prefix of ids, unique on the page.
        alt: the plot described in words.
        x_label: label of the x axis.
        x_range: range of the x axis; None for the range of the points.
        is_log: whether the y axis is logarithmic; needs values above 0.
        has_dots: whether the points are marked.
        has_zero: whether the y axis begins at 0.
    """
    from matplotlib.ticker import NullLocator

    right = max(_width(line.label) for line in drawn) + 4
    figure, axes = _figure(266, 162, left=30, right=right, bottom=27, top=13)
    colors = [_RUNS[line.color % RUN_COLORS] for line in drawn]
    for line, color in zip(drawn, colors, strict=True):
        x, y = _thinned(np.asarray(line.x, float), np.asarray(line.y, float))
        style: dict[str, Any] = {"marker": "o", "markersize": 3.2} if has_dots and len(x) <= 40 else {}
        if len(x) == 1:
            style = {"marker": "o", "markersize": 4}
        axes.plot(x, y, color=color, linewidth=1.5, solid_capstyle="round", **style)
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
    ends = np.array([(line.x[-1], line.y[-1]) for line in drawn])
    _write_labels(axes, ends, [line.label for line in drawn], colors, is_right=True)
    return _svg(figure, name, alt)


def scatter(
    points: np.ndarray, groups: np.ndarray | None, labels: Sequence[str], *, name: str, alt: str, has_names: bool
) -> Html:
    """A plot of points in a plane, without axes.

    Args:
        points: (n, 2).
        groups: (n,) class numbers, which set color and shape, each class at least once; None if there are no classes.
        labels: names of the classes.
        name: prefix of ids, unique on the page.
        alt: the plot described in words.
        has_names: whether each class's name is written in the middle of its points.
    """
    extent = np.ptp(points, axis=0).clip(1e-9)
    figure, axes = _figure(302, 302 * float(np.clip(extent[1] / extent[0], 0.6, 1.0)))
    axes.set_axis_off()
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.04)
    if groups is None:
        axes.plot(*points.T, "o", markersize=3, color=_CLASSES[0], markeredgewidth=0, alpha=0.75)
        return _svg(figure, name, alt)
    colors = [_CLASSES[group % CLASS_COLORS] for group in range(len(labels))]
    for group, color in enumerate(colors):
        axes.plot(*points[groups == group].T, _shape(group), markersize=3.4, color=color, markeredgewidth=0, alpha=0.8)
    if has_names:
        middles = np.stack([np.median(points[groups == group], axis=0) for group in range(len(labels))])
        _write_labels(axes, middles, labels, colors, is_right=False)
    return _svg(figure, name, alt)


def marker(group: int) -> Html:
    """A class's marker as `scatter` draws it, for the legend."""
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
    """A class's marker. It differs from the next class's, and from that of the next class with the same color."""
    return MARKERS[(group + group // CLASS_COLORS) % len(MARKERS)]


def _figure(
    width: float, height: float, left: float = 0, right: float = 0, bottom: float = 0, top: float = 0
) -> tuple[Any, Any]:
    """A figure and its axes. Sizes and margins are in points.

    The margins are given, because matplotlib's own layout would draw everything three times.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    box = left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height
    with rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")
        return figure, figure.add_axes(box, facecolor="none")


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MOST_POINTS` points: means over equal intervals, with the first and the last point unchanged."""
    if len(x) <= MOST_POINTS:
        return x, y
    places = np.linspace(1, len(x) - 1, MOST_POINTS - 1).astype(int)
    starts = np.unique(np.concatenate([[0], places]))
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def _write_labels(axes: Any, places: np.ndarray, labels: Sequence[str], colors: Sequence[str], is_right: bool) -> None:
    """Write each label at its place, (n, 2), or to the right of it, moved so far that no label covers another.

    The style sheet selects labels by their ids and gives them a halo.
    """
    axes.apply_aspect()
    widths = np.array([_width(label) for label in labels])
    shift = np.stack([is_right * widths / 2, 0 * widths], axis=1)
    moved = _apart(axes.transData.transform(places) + shift, widths) - shift
    for label, color, place in zip(labels, colors, axes.transData.inverted().transform(moved), strict=True):
        axes.annotate(
            legal(label),
            place,
            xytext=(5 if is_right else 0, 0),
            textcoords="offset points",
            ha="left" if is_right else "center",
            va="center",
            color=color,
            weight="bold",
            size=_FONT,
            parse_math=False,
            annotation_clip=False,
            gid=f"name_{len(axes.texts)}",
        )


def _width(label: str) -> float:
    """Approximate width of a label, in points, in any reader's font."""
    return 0.62 * _FONT * len(label) + 4


def _apart(centers: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(n, 2) centers of labels, moved up and down until no label covers another. All in points."""
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
    """A figure as an element of the page: its ids are unique there, its colors are the page's variables."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context(_STYLE | {"svg.hashsalt": name, "svg.id": name}):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(out.getvalue())
    root.remove(root[0])  # a style rule, which would apply to the whole page
    root.attrib |= {"role": "img", "aria-label": legal(alt)}
    for element in root.iter():
        if element.tag == f"{{{_SVG}}}g" and "id" in element.attrib:  # the other ids are hashes of their salt
            element.set("id", f"{name}-{element.get('id')}")
        for color, variable in _VARIABLES.items():
            if color in element.get("style", ""):
                element.set("style", element.get("style", "").replace(color, variable))
    return Html(ElementTree.tostring(root, encoding="unicode"))
