"""Images of a report: thumbnails with captions, inside the page."""

import base64
import io

import numpy as np
from PIL import Image

from sslrun.data.pictures import as_rgb
from sslrun.report.html import Child, Html, element

THUMBNAIL = 96  # pixels


def tile(image: np.ndarray, alt: str, caption: Child, class_: str = "", title: str | None = None) -> Html:
    """An image with a caption."""
    height, width = image.shape[:2]
    shown = element("img", src=data_uri(image), alt=alt, width=width, height=height, title=title)
    return element("figure", shown, element("figcaption", caption), class_=f"tile {class_}".strip())


def data_uri(image: np.ndarray) -> str:
    """A (H, W, 3) uint8 image as a data URI."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="WEBP", quality=82, method=4)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def small(image: np.ndarray, side: int = THUMBNAIL) -> np.ndarray:
    """The image (H, W, C) in RGB, reduced to a thumbnail's size if it is larger."""
    thumbnail = Image.fromarray(as_rgb(image))
    thumbnail.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(thumbnail)


def fitted(image: np.ndarray) -> np.ndarray:
    """The image, resized to a thumbnail's size."""
    return np.asarray(Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC))
