"""`sslrun similar`: the images whose vectors are nearest to that of one image, as a list and as a figure."""

import io
import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from sslrun.config.paths import absolute, stated
from sslrun.data import pil_twins
from sslrun.data.pictures import as_rgb
from sslrun.data.sources import Source
from sslrun.embedding.embed import Settings, embed
from sslrun.embedding.images import images_of
from sslrun.errors import RunFailed, UsageError
from sslrun.preview.grid import FAINT, GAP, INK, MARGIN, PAPER
from sslrun.preview.text import font, legible, text_line
from sslrun.runtime import distributed
from sslrun.runtime.log import start_logging
from sslrun.saved import Saved

SIDE, COLUMNS, GROUND = 224, 4, "#e2e2e2"
SMALL, LINE, LINES = 12, 16, 4  # of the names: size of the font, height of a line, and most lines


@dataclass(frozen=True)
class Neighbor:
    """One of the nearest images.

    Attributes:
        path: its path, as `Images.paths` has it.
        cosine: cosine of the angle between its vector and the query's, 1 for equal directions.
        pixels: (H, W, 3) uint8; None if it cannot be shown.
    """

    path: str
    cosine: float
    pixels: np.ndarray | None


@dataclass(frozen=True)
class Similar:
    """The result of a search.

    Attributes:
        query: path of the image that was searched for.
        pixels: its pixels, (H, W, 3) uint8.
        neighbors: the nearest images, nearest first; of equally near ones the first path.
        about: the encoder and the images, in a line.
    """

    query: str
    pixels: np.ndarray | None
    neighbors: list[Neighbor]
    about: str


def similar(saved: Saved, device: torch.device, query: str, subject: str, count: int) -> Similar:
    """Searches for the images that are nearest to one; all ranks of a launcher call it and share the work.

    The query itself is no neighbor of its own, though a copy of it is. Images that cannot be decoded are left out.

    Args:
        saved: the encoder.
        device: where to compute.
        query: path of the image.
        subject: a folder or a recipe, see `images_of`.
        count: number of neighbors.

    Raises:
        UsageError: the query cannot be decoded, or there are no images.
    """
    if not os.path.isfile(absolute(query)):
        raise UsageError(stated(query, " is not a file" if os.path.exists(absolute(query)) else " does not exist"))
    start_logging(distributed.rank(), level=saved.recipe.log.level)
    images = images_of(subject, saved)
    try:
        (wanted,) = embed(saved, device, [query], Settings(l2=True))
    except RunFailed as error:
        raise UsageError(f"{query} has no vector: {str(error).rpartition('the last one: ')[2]}") from None
    cosines = embed(saved, device, images, Settings(l2=True)) @ wanted
    real = os.path.realpath(absolute(query))
    order = [i for i in np.argsort(-cosines, kind="stable").tolist() if not np.isnan(cosines[i])]
    nearest = [i for i in order[: count + 1] if os.path.realpath(images.source.names[i]) != real][:count]
    found = [Neighbor(images.paths[i], float(cosines[i]), _shown(images.source, i)) for i in nearest]
    step = "" if saved.step is None else f", step {saved.step}"
    about = f"{saved.name}{step}: nearest of {len(images.source):,} images in {subject}, cosine similarity"
    (itself,) = images_of([query], saved).source.encoded(np.zeros(1, dtype=np.int64))
    return Similar(query, _decoded(bytes(itself)), found, about)


def draw(found: Similar) -> Image.Image:
    """The query and its neighbors, with similarities and names, as one image."""
    tiles = [_tile("query", found.query, found.pixels)]
    tiles += [_tile(f"{each.cosine:.3f}", each.path, each.pixels) for each in found.neighbors]
    rows = [tiles[:1], *(tiles[first : first + COLUMNS] for first in range(1, len(tiles), COLUMNS))]
    top, places = MARGIN + 2 * LINE + GAP, []
    for row in rows:
        places += [(MARGIN + column * (SIDE + 2 * GAP), top) for column in range(len(row))]
        top += max(tile.height for tile in row) + 2 * GAP
    sheet = Image.new("RGB", (2 * MARGIN + COLUMNS * (SIDE + 2 * GAP) - 2 * GAP, top), PAPER)
    text_line(ImageDraw.Draw(sheet), (MARGIN, MARGIN), found.about, 15, INK, sheet.width - MARGIN)
    for tile, place in zip(tiles, places, strict=True):
        sheet.paste(tile, place)
    return sheet


def wrapped(text: str, width: int) -> list[str]:
    """A text in lines of at most `width` pixels, broken at any character; of a very long one the middle is left out."""
    lines, start = [], 0
    while start < len(text):
        end = start + 1
        while end < len(text) and font(SMALL).getlength(text[start : end + 1]) <= width:
            end += 1
        lines.append(text[start:end])
        start = end
    if len(lines) <= LINES:
        return lines
    half = LINES // 2
    return [*lines[: half - 1], f"{lines[half - 1][:-2]}...", *lines[-(LINES - half) :]]


def _tile(heading: str, path: str, pixels: np.ndarray | None) -> Image.Image:
    """An image with its heading above and its name below."""
    names = wrapped(legible(path), SIDE)
    tile = Image.new("RGB", (SIDE, LINE + 4 + SIDE + 4 + LINE * len(names)), PAPER)
    pen, below = ImageDraw.Draw(tile), LINE + 4
    pen.rectangle((0, below, SIDE - 1, below + SIDE - 1), fill=GROUND)
    pen.text((0, 0), heading, fill=INK, font=font(14))
    if pixels is None:
        pen.text((8, below + 8), "cannot be shown", fill=FAINT, font=font(SMALL))
    else:
        image = _fitted(pixels)
        tile.paste(image, ((SIDE - image.width) // 2, below + (SIDE - image.height) // 2))
    for number, line in enumerate(names):
        pen.text((0, below + SIDE + 4 + number * LINE), line, fill=FAINT, font=font(SMALL))
    return tile


def _fitted(pixels: np.ndarray) -> Image.Image:
    """The image with its longer side as long as a tile's."""
    height, width = (max(1, round(side * SIDE / max(pixels.shape[:2]))) for side in pixels.shape[:2])
    filter = Image.Resampling.LANCZOS if max(pixels.shape[:2]) > SIDE else Image.Resampling.BICUBIC
    return Image.fromarray(as_rgb(pixels)).resize((width, height), filter)


def _shown(source: Source, sample: int) -> np.ndarray | None:
    ids = np.array([sample])
    if source.is_decoded:
        (pixels,) = source.decoded(ids, torch.device("cpu"))
        return np.asarray(pixels)
    content = source.encoded(ids)[0]
    if isinstance(content, np.ndarray) and content.ndim == 3:  # bands of a TIFF file
        return content
    return _decoded(bytes(content))


def _decoded(content: bytes) -> np.ndarray | None:
    try:
        return pil_twins.decode(io.BytesIO(content))
    except UsageError:  # an image that the data path decodes and PIL does not
        return None
