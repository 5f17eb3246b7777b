"""Plots as SVG elements of the page: text stays text, and colors are the style sheet's, light or dark."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sslrun.report.html import Html, element

RUN_COLORS = 6  # --run-0 ... of the style sheet; the seventh run has the first color again, and its own letter
CLASS_COLORS = 10  # --class-0 ...
MOST_POINTS = 300  # of a line
MOST_DOTS = 40  # of a line whose points are marked
FONT = 11  # units of the drawings, which are about pixels
WIDTH, HEIGHT = 355, 210  # of a plot of lines
MAP_WIDTH = 400
GAP = 1.0  # between two labels


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        x: x of its points.
        y: y of its points, as many.
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
    alt: str,
    x_label: str,
    axis: str = "epoch",
    x_range: tuple[float, float] | None = None,
    x_scale: float = 1,
    is_log: bool = False,
    has_dots: bool = False,
    has_zero: bool = False,
) -> Html:
    """A plot of curves over a common axis, each with its label at its end.

    Args:
        drawn: at least one curve, each with at least one point.
        alt: the plot described in words.
        x_label: label of the x axis.
        axis: what the x axis shows; the page shows the plots of one axis at a time.
        x_range: range of the x axis; None for the range of the points.
        x_scale: what one unit of x is in the page's data, such as 60 seconds.
        is_log: whether the y axis is logarithmic; needs values above 0.
        has_dots: whether the points are marked.
        has_zero: whether the y axis begins at 0.
    """
    ys = [np.log10(line.y) if is_log else np.asarray(line.y, float) for line in drawn]
    x_low, x_high = x_range or (min(min(line.x) for line in drawn), max(max(line.x) for line in drawn))
    y_low, y_high = _padded(min(map(np.min, ys)), max(map(np.max, ys)), has_zero)
    y_ticks = _decades(y_low, y_high) if is_log else _ticks(y_low, y_high, 5)
    texts = _tick_texts([10.0**tick for tick in y_ticks] if is_log else y_ticks)
    left = max((_width(text) for text in texts), default=0) + 8
    right, top, bottom = WIDTH - max(_width(line.label, bold=True) for line in drawn) - 6, 14.0, HEIGHT - 34.0

    def across(x: Any) -> np.ndarray:
        return left + 4 + (np.asarray(x, float) - x_low) / ((x_high - x_low) or 1) * (right - left - 8)

    def down(y: Any) -> np.ndarray:
        return bottom - (np.asarray(y, float) - y_low) / ((y_high - y_low) or 1) * (bottom - top)

    parts = _y_axis(texts, down(y_ticks), left, right)
    x_ticks = _ticks(x_low, x_high, 6, is_whole=x_high - x_low >= 2)
    for text, place in zip(_tick_texts(x_ticks), across(x_ticks), strict=True):
        parts.append(_text(text, float(place), bottom + 15, "tick", "middle"))
    parts.append(_text(x_label, right, bottom + 30, "tick", "end"))
    ends = []
    for line, values in zip(drawn, ys, strict=True):
        x, y = across(line.x), down(values)
        path = "M" + "L".join(f"{_short(a)} {_short(b)}" for a, b in zip(x, y, strict=True))
        color = f"line-{line.color % RUN_COLORS}"
        parts.append(element("path", class_=f"line {color}", d=path))
        if len(x) == 1 or (has_dots and len(x) <= MOST_DOTS):
            dots = [element("circle", cx=_short(a), cy=_short(b), r=2.6) for a, b in zip(x, y, strict=True)]
            parts.append(element("g", dots, class_=f"dots {color}"))
        ends.append((x[-1], y[-1]))
    widths = np.array([_width(line.label, bold=True) for line in drawn])
    centers = _apart(np.array(ends) + np.stack([widths / 2 + 6, 0 * widths], axis=1), widths)
    for line, center, width in zip(drawn, centers, widths, strict=True):
        place = center[0] - width / 2
        parts.append(_text(line.label, place, center[1] + 4, f"name line-{line.color % RUN_COLORS}", "start"))
    box = " ".join(_short(side) for side in (left + 4, top, right - 4, bottom))
    return element(
        "svg",
        parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=alt,
        data_axis=axis,
        data_box=box,
        data_x=f"{x_low * x_scale:.9g} {x_high * x_scale:.9g}",
        data_y=f"{y_low:.9g} {y_high:.9g}",
    )


def _y_axis(texts: Sequence[str], places: np.ndarray, left: float, right: float) -> list[Html]:
    """Lines across the plot at the ticks of the y axis, and their numbers."""
    parts = []
    for text, place in zip(texts, places, strict=True):
        height = _short(place)
        ends = {"x1": _short(left), "x2": _short(right), "y1": height, "y2": height}
        parts.append(element("line", class_="grid", **ends))
        parts.append(_text(text, left - 5, float(place) + 4, "tick", "end"))
    return parts


def thinned(columns: Sequence[np.ndarray], most: int = MOST_POINTS) -> list[np.ndarray]:
    """At most `most` points: means over equal intervals of the rows, with the first and the last row unchanged.

    Args:
        columns: (N,) numbers each: x and y of the points, and whatever belongs to them.
        most: largest number of points.
    """
    count = len(columns[0])
    if count <= most:
        return list(columns)
    starts = np.unique(np.concatenate([[0], np.linspace(1, count - 1, most - 1).astype(int)]))
    counts = np.diff(np.append(starts, count))
    return [np.add.reduceat(column, starts) / counts for column in columns]


def scatter(
    points: np.ndarray,
    groups: np.ndarray | None,
    labels: Sequence[str],
    *,
    alt: str,
    has_names: bool,
    thumbnails: Sequence[tuple[np.ndarray, str, int]] = (),
) -> Html:
    """A plot of points in a plane, without axes.

    Args:
        points: (n, 2).
        groups: (n,) numbers of classes or clusters, which set color and shape, each at least once; None for one color.
        labels: names of the groups.
        alt: the plot described in words.
        has_names: whether each group's name is written in the middle of its points.
        thumbnails: a place among the points (2,), an image as a data URI, and its group, of each image that is drawn.
    """
    places, height = _in_frame(points)
    parts: list[Html] = []
    for group in range(len(labels)) if groups is not None else (0,):
        own = places if groups is None else places[groups == group]
        path = "".join(marker_path(group, x, y, 2.6) for x, y in own)
        parts.append(element("path", class_="points", d=path, style=f"fill: {class_color(group)}"))
    side = thumbnail_side(len(thumbnails))
    for place, uri, group in thumbnails:
        x, y = (_short(each - side / 2) for each in place)
        frame = element("rect", x=x, y=y, width=side, height=side, style=f"stroke: {class_color(group)}")
        parts.append(element("g", element("image", x=x, y=y, width=side, height=side, href=uri), frame, class_="thumb"))
    if groups is not None and has_names:
        middles = np.stack([np.median(places[groups == group], axis=0) for group in range(len(labels))])
        widths = np.array([_width(label, bold=True) for label in labels])
        middles[:, 0] = middles[:, 0].clip(widths / 2 + 2, np.maximum(MAP_WIDTH - widths / 2 - 2, widths / 2 + 2))
        apart = _apart(middles, widths)
        apart[:, 1] += min(0, height - 6 - apart[:, 1].max()) + max(0, 10 - apart[:, 1].min())
        for group, (label, (x, y)) in enumerate(zip(labels, apart, strict=True)):
            parts.append(_text(label, x, y + 4, "name", "middle", f"fill: {class_color(group)}"))
    return element("svg", parts, viewBox=f"0 0 {MAP_WIDTH} {_short(height)}", role="img", aria_label=alt)


def longest_name(width: float = MAP_WIDTH / 3) -> int:
    """Number of characters of the longest name that may stand in a map."""
    return int((width - 4) / (0.62 * FONT))


def frame_places(points: np.ndarray) -> np.ndarray:
    """(n, 2) places of points (n, 2) in the drawing of `scatter`."""
    return _in_frame(points)[0]


def thumbnail_side(count: int) -> int:
    """Side of the images in a map, in units of the drawing."""
    return 30 if count <= 60 else 24


def marker(group: int) -> Html:
    """A group's marker as `scatter` draws it, for the legend."""
    path = element("path", d=marker_path(group, 5, 5, 4.2))
    style = f"fill: {class_color(group)}"
    return element("svg", path, viewBox="0 0 10 10", width=10, height=10, aria_hidden="true", style=style)


def class_color(group: int) -> str:
    return f"var(--class-{group % CLASS_COLORS})"


def marker_path(group: int, x: float, y: float, r: float) -> str:
    """The outline of a group's marker around a point. Groups differ in shape as well as in color, for readers who see
    fewer colors: a shape differs from that of the next group, and of the next group with the same color."""
    shape = (group + group // CLASS_COLORS) % 5
    a, b = _short(x - r), _short(y)
    s, t, u = _short(r), _short(2 * r), _short(-r)
    if shape == 0:
        return f"M{a} {b}a{s} {s} 0 1 0 {t} 0a{s} {s} 0 1 0 -{t} 0z"
    if shape == 1:
        return f"M{_short(x)} {_short(y - r)}l{s} {t}h-{t}z"
    if shape == 2:
        return f"M{a} {_short(y - r)}h{t}v{t}h-{t}z"
    if shape == 3:
        return f"M{a} {b}l{s} {u}l{s} {s}l{u} {s}z"
    return f"M{_short(x)} {_short(y + r)}l{u} -{t}h{t}z"


def _in_frame(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Places of points in a drawing of MAP_WIDTH with equal scales of both axes, and the drawing's height."""
    margin = 16.0
    low, extent = points.min(axis=0), np.ptp(points, axis=0).clip(1e-9)
    height = MAP_WIDTH * float(np.clip(extent[1] / extent[0], 0.6, 1.0))
    room = np.array([MAP_WIDTH, height]) - 2 * margin
    scale = float((room / extent).min())
    places = (points - low - extent / 2) * [scale, -scale] + [MAP_WIDTH / 2, height / 2]
    return places, height


def _padded(low: float, high: float, has_zero: bool) -> tuple[float, float]:
    """The range of the y axis: a little more than that of the values."""
    if has_zero:
        return 0.0, 1.08 * high or 1.0
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return float(low - room), float(high + room)


def _ticks(low: float, high: float, most: int, is_whole: bool = False) -> list[float]:
    """At most `most` + 1 round numbers between two numbers, at equal distances."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough * 0.999)
    if is_whole:
        step = max(1.0, float(math.ceil(step)))
    first = math.ceil(low / step - 1e-9)
    return [float(f"{place * step:.12g}") for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Exponents of ten between two exponents; ten at most."""
    first, last = math.ceil(low), math.floor(high)
    return [float(each) for each in range(first, last + 1, max(1, -(-(last - first + 1) // 8)))] or [(low + high) / 2]


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """Numbers as text, with as many digits as tell them apart; scientific for very small and very large ones."""
    largest = max(map(abs, ticks), default=0.0)
    step = min((abs(b - a) for a, b in itertools.pairwise(ticks)), default=largest) or 1.0
    if largest and not 1e-3 <= largest < 1e6:
        digits = max(0, math.floor(math.log10(largest)) - math.floor(math.log10(step)))
        texts = [f"{tick:.{min(digits, 6)}e}" if tick else "0" for tick in ticks]
        return [_plain_exponent(text) for text in texts]
    digits = next((each for each in range(9) if abs(step * 10**each - round(step * 10**each)) < 1e-6), 9)
    return [f"{tick:,.{digits}f}" for tick in ticks]


def _plain_exponent(text: str) -> str:
    mantissa, _, exponent = text.partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}" if exponent else text


def _text(text: str, x: float, y: float, class_: str, anchor: str, style: str | None = None) -> Html:
    return element("text", text, class_=class_, x=_short(x), y=_short(y), text_anchor=anchor, style=style)


def _short(value: float | np.ndarray) -> str:
    """A coordinate with at most two decimals."""
    return f"{float(value):.2f}".rstrip("0").rstrip(".")


def _width(label: str, bold: bool = False) -> float:
    """Approximate width of a label in any reader's font."""
    return (0.62 if bold else 0.58) * FONT * len(label) + (4 if bold else 0)


def _apart(centers: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(n, 2) centers of labels, moved up and down until no label covers another."""
    centers, height = centers.copy(), FONT + GAP
    for _ in range(300):
        gap = centers[:, None] - centers[None]
        covers = (np.abs(gap[..., 0]) < (widths[:, None] + widths) / 2) & (np.abs(gap[..., 1]) < height)
        pairs = [(one, other) for one, other in np.argwhere(covers) if one < other]
        if not pairs:
            break
        for one, other in pairs:
            lower, upper = (one, other) if centers[one, 1] >= centers[other, 1] else (other, one)
            push = max(height - (centers[lower, 1] - centers[upper, 1]), 0) / 2 + 0.05
            centers[lower, 1] += push
            centers[upper, 1] -= push
    return centers
