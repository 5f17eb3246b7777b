"""Samples as one image: a row for each, the original beside its views, and PIL's versions below on request."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sslrun.data.pictures import as_rgb
from sslrun.errors import UsageError
from sslrun.preview.description import by, describe_sample, sample_in_words
from sslrun.preview.samples import Samples
from sslrun.preview.text import font, text_line
from sslrun.runtime.durable import replace_file

AMPLIFIED = 16  # how much brighter differences are shown than they are
WIDEST = 2048  # pixels of the whole, where small enough tiles make that possible
SIDES = (224, 192, 160, 128, 96)  # of tiles: the first that does
GAP, MARGIN, LINE = 10, 20, 18
INK, FAINT, PAPER = "#1a1a1a", "#6b6b6b", "#f2f2f2"
COLORS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#e377c2", "#8c564b", "#bcbd22")


@dataclass(frozen=True)
class Layout:
    """The positions of all parts of the image, in pixels.

    Attributes:
        size: width and height of the image.
        originals: width and height in which each original is shown.
        zooms: for each view, how often each of its pixels is repeated, down and across.
        lefts: left edges of the column of originals and of the columns of views.
        tops: for each sample, the top edges of its line of text and of its lines of tiles.
    """

    size: tuple[int, int]
    originals: list[tuple[int, int]]
    zooms: list[int]
    lefts: list[int]
    tops: list[list[int]]


def lay_out(originals: Sequence[tuple[int, int]], views: Sequence[tuple[int, int]], with_pil: bool = False) -> Layout:
    """Makes views as large as the width allows, their pixels enlarged by whole numbers.

    Args:
        originals: height and width of each original.
        views: height and width of each view, the same for all samples.
        with_pil: whether a sample has three lines of tiles (ours, PIL's, difference), with text beside and below them.
    """
    fitted = [_fitted_size(size) for size in originals]
    for side in SIDES:
        zooms = [max(1, side // max(size)) for size in views]
        tiles = [(width * zoom, height * zoom) for (height, width), zoom in zip(views, zooms, strict=True)]
        widths = [max(120, *(width for width, _ in fitted)), *(width for width, _ in tiles)]
        first = MARGIN + (90 if with_pil else 0)
        lefts = [first + sum(widths[:column]) + column * GAP for column in range(len(widths))]
        right = lefts[-1] + widths[-1] + MARGIN
        if right <= WIDEST:
            break
    tops, y = [], MARGIN + 5 * LINE + GAP  # below the title and the headings of the columns
    for _, original in fitted:
        tops.append([y])
        y += LINE + 4
        for _ in range(3 if with_pil else 1):
            tops[-1].append(y)
            y += max(original, *(height for _, height in tiles)) + GAP
        y += GAP + (2 * LINE if with_pil else 0)
    return Layout((max(right, 420), y), fitted, zooms, lefts, tops)


def draw(samples: Samples, twins: tuple[list[np.ndarray], list[np.ndarray | None]] | None = None) -> Image.Image:
    """Draws the samples.

    Args:
        samples: what to show.
        twins: the same samples made by PIL (`pil_versions`): shown below ours, and below them the difference.
    """
    sizes = [(len(image), len(image[0])) for image in samples.originals]
    layout = lay_out(sizes, [samples.groups[g].size for g, _ in samples.columns], twins is not None)
    sheet = Image.new("RGB", layout.size, PAPER)
    pen = ImageDraw.Draw(sheet)
    _draw_headings(pen, samples, layout)
    for row, (top, *lines) in enumerate(layout.tops):
        sample = describe_sample(samples, row)
        text_line(pen, (layout.lefts[0], top), sample_in_words(sample), 13, INK, layout.size[0] - MARGIN)
        if twins is not None:
            words = (f"{samples.augment} mode", "PIL", f"difference\nx {AMPLIFIED}")
            for y, word in zip(lines, words, strict=True):
                pen.text((MARGIN, y), word, fill=FAINT, font=font(13))
        for column, left in enumerate(layout.lefts):
            ours, theirs = _pair(samples, twins, column, row)
            tiles = _stack(ours, theirs)
            if column:
                tiles[0] = as_rgb(samples.shown(*samples.columns[column - 1], row))
            for y, pixels in zip(lines, tiles, strict=False):
                zoom = layout.zooms[column - 1] if column else 0
                tile = _enlarged(pixels, zoom) if zoom else _fitted(pixels, layout.originals[row])
                if column == 0 and y == lines[0]:
                    _outline(tile, [view["part_of_original_px"] for view in sample["views"]], ours.shape[:2])
                sheet.paste(tile, (left, y))
                below = y + tile.height + 2
            if theirs is not None:
                pen.text((left, below), _error(ours, theirs), fill=FAINT, font=font(12))
    return sheet


def write(image: Image.Image, path: Path) -> None:
    """Write a PNG file, whole or not at all.

    Raises:
        UsageError: it cannot be written.
    """
    content = io.BytesIO()
    image.save(content, "PNG")
    try:
        replace_file(path, content.getvalue())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None


def _draw_headings(pen: ImageDraw.ImageDraw, samples: Samples, layout: Layout) -> None:
    first, last = samples.plan.positions[[0, -1]].tolist()
    text_line(pen, (MARGIN, MARGIN), samples.name, 17, INK, layout.size[0] - MARGIN)
    run = f"seed {samples.seed}, epoch {samples.plan.epoch}"
    about = f"{run}, positions {first} to {last}; {samples.augment} mode, {samples.device}"
    if (channels := samples.source.channels) not in (1, 3):
        about += f"; channels {'1 to 3' if channels > 3 else '1'} of {channels} are shown"
    text_line(pen, (MARGIN, MARGIN + LINE + 6), about, 13, FAINT, layout.size[0] - MARGIN)
    y = MARGIN + 2 * LINE + GAP + 4
    pen.text((layout.lefts[0], y), "original", fill=INK, font=font(14))
    for number, (left, zoom, (g, _)) in enumerate(zip(layout.lefts[1:], layout.zooms, samples.columns, strict=True)):
        pen.rectangle((left, y + 4, left + 9, y + 13), fill=COLORS[number % len(COLORS)])
        pen.text((left + 15, y), f"view {number + 1}", fill=INK, font=font(14))
        shown = f", shown x {zoom}" if zoom > 1 else ""
        pen.text((left, y + LINE), by(samples.groups[g].size) + f" px{shown}", fill=FAINT, font=font(12))


def _pair(
    samples: Samples, twins: tuple[list[np.ndarray], list[np.ndarray | None]] | None, column: int, row: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Our version and PIL's of the original (column 0) or of a view."""
    if column == 0:
        return as_rgb(samples.originals[row]), None if twins is None else as_rgb(twins[0][row])
    g, view = samples.columns[column - 1]
    line = samples.line(view, row)
    theirs = None if twins is None else twins[1][g]
    return as_rgb(samples.views[g][line]), None if theirs is None else as_rgb(theirs[line])


def _stack(ours: np.ndarray, theirs: np.ndarray | None) -> list[np.ndarray]:
    """The tiles of one column from top to bottom: ours and, with a twin, the twin and the difference."""
    if theirs is None:
        return [ours]
    return [ours, theirs, (difference(ours, theirs) * AMPLIFIED).clip(0, 255).astype(np.uint8)]


def difference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Absolute difference of two images of one size, (h, w, 3) int16, in gray levels."""
    return np.abs(ours.astype(np.int16) - theirs.astype(np.int16))


def _error(ours: np.ndarray, theirs: np.ndarray) -> str:
    levels = difference(ours, theirs)
    return f"mean {levels.mean():.3f}\nmax {levels.max()}"


def _enlarged(pixels: np.ndarray, zoom: int) -> Image.Image:
    """The image with each pixel repeated zoom x zoom times."""
    return Image.fromarray(pixels.repeat(zoom, axis=0).repeat(zoom, axis=1))


def _fitted_size(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height at which an original, (height, width), is shown: enlarged by a whole number, or made smaller."""
    height, width = size
    scale = SIDES[0] // max(size) or SIDES[0] / max(size)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _fitted(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    filter = Image.Resampling.NEAREST if size[0] >= pixels.shape[1] else Image.Resampling.LANCZOS
    return Image.fromarray(pixels).resize(size, filter)


def _outline(tile: Image.Image, boxes: Sequence[Sequence[float] | None], size: tuple[int, ...]) -> None:
    """Draw a frame on an original, (height, width) `size`, around the part that each view shows."""
    pen, scale = ImageDraw.Draw(tile), tile.width / size[1]
    for number, box in enumerate(boxes):
        if box is not None:
            top, left, height, width = (side * scale for side in box)
            # At least a pixel, also where the view shows less than one of the original.
            corners = (left, top, left + max(width - 1, 0), top + max(height - 1, 0))
            pen.rectangle(corners, outline=COLORS[number % len(COLORS)], width=2)
