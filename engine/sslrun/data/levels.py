"""Image files with other values than whole numbers from 0 to 255 become files with such, by a stated rule.

The decoder takes the full range of a file's type for black to white: 12 bits in a 16-bit PNG come out black, and floats
from 0 to 255 white. So such files are decoded here first, where they are read.
"""

import io
import re
import threading
from collections.abc import Sequence
from typing import IO, Any, Literal

import numpy as np
from PIL import Image

from sslrun.data import dali
from sslrun.data.decoding import decode_trouble
from sslrun.errors import UsageError

Range = Literal["auto", "full"] | Sequence[float]

_INTEGERS = (255, 4095, 65535)  # 8, 12 and 16 bits
_FLOATS = (1, *_INTEGERS)
_SPACE = rb"(?:\s+(?:#[^\n]*\n\s*)*)"
_PNM = re.compile(rb"P([56])" + _SPACE + rb"(\d+)" + _SPACE + rb"(\d+)" + _SPACE + rb"(\d+)\s")
_STARTS = (b"\x89P", b"II", b"MM", b"P5", b"P6")  # of PNG, TIFF, PNM: a JPEG begins otherwise
_graphs = threading.local()


def checked(levels: Range) -> Range:
    """The argument `range` of a source.

    Raises:
        UsageError: it is no range.
    """
    if levels in ("auto", "full"):
        return levels
    if isinstance(levels, str) or len(levels) != 2 or not levels[0] < levels[1]:
        raise UsageError(f'range must be "auto", "full" or [black, white], two ascending numbers, not {levels!r}')
    return float(levels[0]), float(levels[1])


def kind(file: IO[bytes]) -> tuple[str, int] | None:
    """What the values of an image file are, if they are not whole numbers from 0 to 255: "float" or "integer", and for
    integers the largest one that its type has (65535, or what the header of a PNM file says)."""
    head = file.read(1024)
    if head.startswith(b"\x89PNG"):
        return ("integer", 65535) if head[24:25] == b"\x10" else None
    if match := _PNM.match(head):
        return ("integer", int(match[4])) if 0 < int(match[4]) < 65536 and int(match[4]) != 255 else None
    if head[:2] in (b"II", b"MM"):
        file.seek(0)
        try:
            with Image.open(file) as image:
                tags: Any = getattr(image, "tag_v2", {})
                bits, formats = tags.get(258, (1,)), tags.get(339, (1,))
        except Exception:  # Pillow's plugins raise whatever a damaged header leads them to
            return None
        if formats[0] == 3:
            return "float", 0
        return ("integer", 65535) if bits[0] == 16 and formats[0] == 1 else None
    return None


def in_8_bits(content: bytes, levels: Range) -> bytes:
    """An image file, as it is if its values are whole numbers from 0 to 255, else as a PNM file with such.

    Args:
        content: the file.
        levels: the values that become black and white; "full" takes the whole range of the file's type (0 to 1 for
            floats). "auto" takes 0 to the smallest of 255, 4095 and 65535 (of 1 too, for floats) that no value of the
            image exceeds, or, for PNM, to the largest value that the header states.

    Raises:
        ValueError: the image cannot be decoded, or no range fits.
    """
    found = kind(io.BytesIO(content)) if content[:2] in _STARTS else None
    is_pnm = content[:1] == b"P"
    if found is None or (levels == "full" and not is_pnm):
        return content
    what, largest = found
    values = _of_pnm(content) if is_pnm else _decoded(content)
    if what == "integer" and not is_pnm:
        values = np.rint(values * largest)
    pixels = as_bytes(values, what, largest, "full" if is_pnm and isinstance(levels, str) else levels)
    return b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


def as_bytes(values: np.ndarray, what: str, largest: float, levels: Range) -> np.ndarray:
    """Values of an image as whole numbers from 0 to 255, by the rule of `in_8_bits`.

    Args:
        values: of any shape.
        what: "float" or "integer".
        largest: what "full" takes for white.
        levels: as of `in_8_bits`.

    Raises:
        ValueError: no range fits.
    """
    low, high = 0.0, float(largest)
    if not isinstance(levels, str):
        low, high = levels
    elif levels == "auto":
        finite = values[np.isfinite(values)]
        smallest, most = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
        fitting = [limit for limit in (_FLOATS if what == "float" else _INTEGERS) if most <= limit]
        if smallest < 0 or not fitting:
            raise ValueError(f"values from {smallest:g} to {most:g}: set range = [black, white] of the source")
        high = fitting[0]
    scaled = (np.nan_to_num(values, nan=low) - low) / (high - low)
    return np.rint(scaled.clip(0, 1) * 255).astype(np.uint8)


def _of_pnm(content: bytes) -> np.ndarray:
    """(H, W, 3) values of a binary PNM file. The decoder does not look at the largest value that the header states."""
    match = _PNM.match(content)
    assert match is not None
    form, width, height, largest = map(int, match.groups())
    count, type_ = height * width * (1 if form == 5 else 3), np.dtype(">u2" if largest > 255 else "u1")
    if len(content) - match.end() < count * type_.itemsize:
        raise ValueError("cut short or damaged")
    values = np.frombuffer(content, dtype=type_, count=count, offset=match.end()).reshape(height, width, -1)
    return np.broadcast_to(values, (height, width, 3)).astype(np.float64)


def _decoded(content: bytes) -> np.ndarray:
    """(H, W, 3) float64: values of a float image, and shares of the type's largest value of others."""
    if getattr(_graphs, "own", None) is None:
        _graphs.own = _build()
    try:
        (images,) = _graphs.own.run(encoded=[np.frombuffer(content, dtype=np.uint8)])
    except RuntimeError as error:
        _graphs.own = None  # a graph that has failed is not used again
        raise ValueError(decode_trouble(str(error))) from None
    return np.asarray(images[0], dtype=np.float64)


def _build() -> Any:
    dali.require("decoding images")
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def
    def alone() -> Any:
        return fn.decoders.image(
            fn.external_source(name="encoded", batch=True),
            device="cpu",
            adjust_orientation=False,
            dtype=types.FLOAT,  # type: ignore[attr-defined]
        )

    graph = alone(batch_size=1, prefetch_queue_depth=1, num_threads=1, device_id=None, exec_dynamic=True)
    graph.build()
    return graph
