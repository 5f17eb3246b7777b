"""Images of any number of bands, read without DALI: TIFF files by tifffile, others (PNG with alpha) by Pillow.

The only place that knows tifffile.
"""

import importlib.util
import io
import math
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from sslrun.data.levels import Range, as_bytes
from sslrun.errors import UsageError

_TIFF = (b"II", b"MM")


def count(path: str) -> int | None:
    """Bands of a TIFF file; None if it cannot be read, or tifffile is not installed."""
    if importlib.util.find_spec("tifffile") is None:
        return None
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0]
            return math.prod(extent for axis, extent in zip(series.axes, series.shape, strict=True) if axis not in "YX")
    except Exception:  # it raises whatever a damaged header leads it to
        return None


def require_reader(channels: int, has_tiff: bool) -> None:
    """Raises UsageError if TIFF files are to be read and tifffile is not installed."""
    if has_tiff and importlib.util.find_spec("tifffile") is None:
        raise UsageError(
            f"tifffile, which reads TIFF files of {channels} channels, is not installed: pip install 'sslrun[tiff]'"
        )


def size(file: BinaryIO) -> tuple[int, int]:
    """Height and width in the header of an open image file. Raises what the reader raises if they cannot be read."""
    start = file.read(2)
    file.seek(0)
    if start not in _TIFF:
        with Image.open(file) as image:
            return image.height, image.width
    import tifffile

    with tifffile.TiffFile(file, name="image.tif") as tiff:  # the name of an open file may be a number
        series = tiff.series[0]
        extents = dict(zip(series.axes, series.shape, strict=True))
        return int(extents["Y"]), int(extents["X"])


def pixels(content: bytes, channels: int, levels: Range) -> np.ndarray:
    """(H, W, channels) uint8, the bands of an image in the order of the file.

    Args:
        content: the file.
        channels: the number of bands that it must have.
        levels: how values other than bytes become such, by one rule for all bands; see `levels.in_8_bits`.

    Raises:
        ValueError: the file cannot be read or has another number of bands, or no range fits.
    """
    try:
        values = _of_tiff(content) if content[:2] in _TIFF else _of_pillow(content)
    except ValueError:
        raise
    except Exception as error:  # both raise whatever a damaged header leads them to
        raise ValueError(
            f"cut short or damaged ({next(iter(str(error).splitlines()), type(error).__name__)})"
        ) from None
    if values.shape[2] != channels:
        raise ValueError(f"it has {values.shape[2]} bands, and channels of the source is {channels}")
    values = np.ascontiguousarray(values)  # pages and planes become samples
    if values.dtype == np.uint8:
        return values
    is_float = values.dtype.kind == "f"
    largest = 1 if is_float else np.iinfo(values.dtype).max
    return as_bytes(values.astype(np.float64), "float" if is_float else "integer", largest, levels)


def _of_pillow(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        values = np.asarray(image)
    return values if values.ndim == 3 else values[:, :, None]


def _of_tiff(content: bytes) -> np.ndarray:
    """The first image of a TIFF file; its bands may be samples of a pixel, planes or pages."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        series = tiff.series[0]
        axes, values = series.axes, np.asarray(series.asarray())
    extents: dict[str, Any] = dict(zip(axes, values.shape, strict=True))
    others = [axis for axis in axes if axis not in "YX" and extents[axis] > 1]
    if len(others) > 1 or "Y" not in axes or "X" not in axes:
        raise ValueError(f"it has the dimensions {axes} {values.shape}, expected height, width and bands")
    order = [axes.index(axis) for axis in axes if axis not in "YX"]
    moved = values.transpose(axes.index("Y"), axes.index("X"), *order)
    return moved.reshape(*moved.shape[:2], -1)
