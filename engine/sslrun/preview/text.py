"""Text in images, legible whatever fonts a machine has."""

import functools

from PIL import ImageDraw, ImageFont

from sslrun.errors import printable

LACKING = "\uffff"  # no character: every font shows its sign for a letter that it lacks


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The machine's DejaVu Sans, else the font in Pillow, which has no letters beyond ASCII."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size - 1)  # it is wider than Pillow's
    except OSError:
        return ImageFont.load_default(size)


def legible(text: str) -> str:
    """The text in one line, with what cannot be printed and letters that the font lacks escaped, as in "gr\\xf6ber"."""
    return "".join(c if _is_drawn(c) else c.encode("unicode_escape").decode() for c in printable(text))


def text_line(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, fill: str, right: int) -> None:
    """One line of text that ends before `right`, its middle left out where it is too long."""
    text = legible(text)
    face, kept, shown = font(size), len(text), text
    while kept and (length := face.getlength(shown)) > right - place[0]:
        kept = min(kept - 1, int(kept * (right - place[0]) / length))
        shown = f"{text[: kept - kept // 2]}...{text[len(text) - kept // 2 :]}"
    pen.text(place, shown, fill=fill, font=face)


@functools.cache
def _is_drawn(letter: str) -> bool:
    return bytes(font(16).getmask(letter)) != bytes(font(16).getmask(LACKING))
