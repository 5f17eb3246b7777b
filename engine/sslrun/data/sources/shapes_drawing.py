"""Draws the images of the `Shapes` source: numpy and Pillow only, so that it can run as a program of its own.

An image shows several silhouettes of one kind with the same ornament, or a single one, twice as large. The kind is the
class. Everything else is random: their number, places, sizes, rotations and colors, the background's colors and weave,
the direction, brightness and warmth of the light. All kinds have equal areas, so the amount of ink does not tell them
apart.

    python shapes_drawing.py FOLDER SPEC.json FIRST STEP     draws images FIRST, FIRST + STEP, ... of the specification
"""

import colorsys
import io
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

VERSION = 1  # of the images: another one, another folder
_SUPERSAMPLING = 4
_QUALITY = 92


@dataclass(frozen=True)
class Spec:
    """What to draw; two equal specifications give equal files.

    Attributes:
        num_images: number of images, the ten classes in turn.
        size: height and width in pixels.
        stream: number that separates splits.
        seed: seed of the drawing.
        rotation: smallest and largest rotation of a silhouette, degrees.
        lighting: smallest and largest brightness of the light.
        layout: arrangement of the silhouettes, "strewn" or "single".
    """

    num_images: int
    size: int
    stream: int
    seed: int
    rotation: tuple[float, float]
    lighting: tuple[float, float]
    layout: str = "strewn"


def _arc(count: int, start: float = 0.0, stop: float = 2 * math.pi) -> np.ndarray:
    angles = np.linspace(start, stop, count)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _spokes(radii: list[float]) -> np.ndarray:
    angles = np.arange(len(radii)) * (2 * math.pi / len(radii)) - math.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array(radii)[:, None]


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2], axis=1)


def _drop() -> np.ndarray:
    return np.concatenate([[[0.0, -2.1]], _arc(32, -0.42, math.pi + 0.42)])


def _moon() -> np.ndarray:
    tip = 0.75
    outer, inner = _arc(40, tip, 2 * math.pi - tip), _arc(40, 2 * math.pi - 1.32, 1.32)
    return np.concatenate([outer, inner * math.sin(tip) / math.sin(1.32) + [math.cos(tip) - 0.175, 0.0]])


def _flower() -> np.ndarray:
    petals = np.abs(np.cos(3.5 * np.linspace(0, 2 * math.pi, 98, endpoint=False)))
    return _arc(99)[:-1] * (0.5 + 0.5 * petals**0.7)[:, None]


# Name -> outline, hole or None; x to the right, y down, any scale.
_ARROW = [(0, -10), (8, -1), (3, -1), (3, 10), (-3, 10), (-3, -1), (-8, -1)]
_BOLT = [(2, -11), (-7, 2), (-1, 2), (-3, 11), (7, -3), (1, -3), (5, -11)]
_CROSS = [(-3, -9), (3, -9), (3, -3), (9, -3), (9, 3), (3, 3), (3, 9), (-3, 9), (-3, 3), (-9, 3), (-9, -3), (-3, -3)]
_OUTLINES: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
    "arrow": (np.array(_ARROW, dtype=float), None),
    "bolt": (np.array(_BOLT, dtype=float), None),
    "cross": (np.array(_CROSS, dtype=float), None),
    "drop": (_drop(), None),
    "flower": (_flower(), None),
    "heart": (_heart(), None),
    "moon": (_moon(), None),
    "ring": (_arc(48), _arc(48) * 0.55),
    "star": (_spokes([1.0, 0.45] * 5), None),
    "triangle": (_spokes([1.0] * 3), None),
}


def _area(outline: np.ndarray) -> float:
    x, y = outline[:, 0], outline[:, 1]
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _of_unit_area(outline: np.ndarray, hole: np.ndarray | None) -> list[np.ndarray]:
    scale = 1 / math.sqrt(_area(outline) - (0.0 if hole is None else _area(hole)))
    return [part * scale for part in (outline, hole) if part is not None]


CLASS_NAMES = sorted(_OUTLINES)
_SILHOUETTES = [_of_unit_area(*_OUTLINES[name]) for name in CLASS_NAMES]


def relative_path(i: int) -> str:
    """Path of image i below the folder."""
    return os.path.join(CLASS_NAMES[i % len(CLASS_NAMES)], f"{i:06d}.jpg")


def draw(spec: Spec, i: int) -> bytes:
    """Image i as a JPEG file, a pure function of its arguments."""
    random = np.random.Generator(np.random.Philox(key=spec.seed % 2**64, counter=[0, 0, spec.stream, i]))
    size, label = spec.size, i % len(CLASS_NAMES)
    light_x, light_y = _rotation(_between(random, 0, 2 * math.pi))[0].tolist()
    figures = _LAYOUTS[spec.layout](random, spec.rotation)
    mask = _silhouettes(figures, label, size)
    canvas = _background(random, size)
    shadow = np.asarray(mask.filter(ImageFilter.GaussianBlur(size / 28)), dtype=np.float32) / 255
    shift = round(0.04 * size * light_y), round(0.04 * size * light_x)
    canvas *= 1 - 0.45 * np.roll(shadow, shift, axis=(0, 1))[..., None]
    slope_y, slope_x = np.gradient(np.asarray(mask.filter(ImageFilter.GaussianBlur(size / 45)), dtype=np.float32) / 255)
    relief = 1 - size / 40 * (slope_x * light_x + slope_y * light_y)
    ink = np.asarray(mask, dtype=np.float32)[..., None] / 255
    canvas += ink * (_fill(random, figures, label, size) * relief[..., None] - canvas)
    canvas *= _lighting(random, spec, light_x, light_y)
    canvas += (random.random(canvas.shape, dtype=np.float32) - 0.5) * np.float32(0.03)
    pixels = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY, subsampling=0)
    return file.getvalue()


def _between(random: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * random.random()


def _colors(
    random: np.random.Generator, count: int, saturation: tuple[float, float], value: tuple[float, float]
) -> np.ndarray:
    """(count, 3) RGB in [0, 1] of any hue."""
    draws = random.random((count, 3))
    saturations = saturation[0] + (saturation[1] - saturation[0]) * draws[:, 1]
    values = value[0] + (value[1] - value[0]) * draws[:, 2]
    rows = zip(draws[:, 0].tolist(), saturations.tolist(), values.tolist(), strict=True)
    return np.array([colorsys.hsv_to_rgb(*row) for row in rows], dtype=np.float32)


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x as a row and y as a column, from 0 to 1."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    return line[None, :], line[:, None]


def _background(random: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) background: four colors with smooth transitions, and a faint weave."""
    x, y = _grid(size)
    turn, frequency = _between(random, 0, math.pi), _between(random, 12, 60)
    u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    weaves = [np.sin(u * frequency), np.sin(u * frequency) * np.sin(v * frequency), np.cos(u * frequency) + v]
    weave = weaves[random.integers(len(weaves))] * _between(random, 0.0, 0.04)
    corners = _colors(random, 4, (0.0, 0.3), (0.25, 0.85))
    small = Image.fromarray((corners * 255).astype(np.uint8).reshape(2, 2, 3))
    smooth = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    return smooth + weave[..., None]


@dataclass(frozen=True)
class _Figures:
    """The n silhouettes of an image.

    Attributes:
        places: (n, 2) x and y as fractions of the image's side.
        turns: (n,) rotations in radians.
        sides: (n,) sides of the squares of equal area, as fractions of the image's side.
    """

    places: np.ndarray
    turns: np.ndarray
    sides: np.ndarray


def _strewn(random: np.random.Generator, rotation: tuple[float, float]) -> _Figures:
    """A rotated hexagonal grid that covers the image and its border; every place is shifted a little."""
    side = _between(random, 0.26, 0.32)
    pitch = side * _between(random, 1.35, 1.55)
    n = int(1.1 / pitch) + 1
    row, column = (axis.ravel() for axis in np.mgrid[-n : n + 1, -n : n + 1].astype(float))
    places = np.stack([column + 0.5 * (row % 2), row * math.sqrt(3) / 2], axis=1) + random.random(2)
    places += 0.3 * (random.random(places.shape) - 0.5)
    places = places @ _rotation(_between(random, 0, math.pi)) * pitch + 0.5
    places = places[(places > -side / 2).all(axis=1) & (places < 1 + side / 2).all(axis=1)]
    draws = random.random((len(places), 2))
    turns = np.radians(rotation[0] + (rotation[1] - rotation[0]) * draws[:, 0])
    return _Figures(places, turns, side * (0.9 + 0.2 * draws[:, 1]))


def _single(random: np.random.Generator, rotation: tuple[float, float]) -> _Figures:
    """One silhouette near the center."""
    turn, side = math.radians(_between(random, *rotation)), _between(random, 0.45, 0.6)
    return _Figures(0.5 + 0.16 * (random.random((1, 2)) - 0.5), np.array([turn]), np.array([side]))


_LAYOUTS = {"strewn": _strewn, "single": _single}


def _rotation(angle: float) -> np.ndarray:
    """Matrix that rotates rows (x, y)."""
    return np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def _silhouettes(figures: _Figures, label: int, size: int) -> Image.Image:
    """Coverage, 0 to 255, drawn four times as large and averaged."""
    scale = size * _SUPERSAMPLING
    mask = Image.new("L", (scale, scale))
    pen = ImageDraw.Draw(mask)
    rows = zip(figures.places, figures.turns.tolist(), figures.sides.tolist(), strict=True)
    for place, turn, side in rows:
        for part, fill in zip(_SILHOUETTES[label], (255, 0), strict=False):
            points = (part @ _rotation(turn) * side + place) * scale
            pen.polygon(points.ravel().tolist(), fill=fill)
    return mask.reduce(_SUPERSAMPLING)


def _fill(random: np.random.Generator, figures: _Figures, label: int, size: int) -> np.ndarray:
    """(size, size, 3) color at each place: the nearest silhouette's two colors in the ornament of its kind."""
    x, y = _grid(size)
    left, top = figures.places.astype(np.float32).T
    nearest = ((x - left[:, None, None]) ** 2 + (y - top[:, None, None]) ** 2).argmin(axis=0)
    right, down = x - left[nearest], y - top[nearest]
    cosine, sine = ((f(figures.turns) / figures.sides).astype(np.float32)[nearest] for f in (np.cos, np.sin))
    u, v = right * cosine + down * sine, down * cosine - right * sine
    mix = np.clip(0.5 + 1.2 * _ORNAMENTS[CLASS_NAMES[label]](u, v), 0, 1)[..., None]
    light = _colors(random, len(figures.places), (0.3, 1.0), (0.6, 1.0))[nearest]
    dark = _colors(random, len(figures.places), (0.3, 1.0), (0.2, 0.5))[nearest]
    return light + mix * (dark - light)


# The light color where negative, the dark one where positive; u points right and v down in the silhouette's frame.
_ORNAMENTS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "arrow": lambda u, v: np.sin(8 * v),
    "bolt": lambda u, v: np.sin(11 * (v + np.abs((u * 2.2) % 1 - 0.5))),
    "cross": lambda u, v: 1.5 * np.sin(12 * u) * np.sin(12 * v),
    "drop": lambda u, v: np.sin(10 * np.hypot(u, v)),
    "flower": lambda u, v: 8 * (0.22 - np.hypot(u, v)),
    "heart": lambda u, v: np.full_like(u, -1.0),
    "moon": lambda u, v: np.cos(10 * u) + np.cos(10 * v) - 0.6,
    "ring": lambda u, v: np.sin(7 * np.arctan2(v, u)),
    "star": lambda u, v: np.cos(5 * np.arctan2(u, -v)) + 0.3,
    "triangle": lambda u, v: np.sin(10 * u),
}


def _lighting(random: np.random.Generator, spec: Spec, light_x: float, light_y: float) -> np.ndarray:
    """(size, size, 3) brightness of the light: it grows towards the light, which is warm or cold."""
    x, y = _grid(spec.size)
    slope, warmth = _between(random, 0.0, 0.5), _between(random, -0.08, 0.08)
    field = _between(random, *spec.lighting) * (1 - slope * ((x - 0.5) * light_x + (y - 0.5) * light_y))
    return field[..., None] * np.array([1 + warmth, 1, 1 - warmth], dtype=np.float32)


def main(folder: str, spec_file: str, first: int, step: int) -> None:
    """Draw every `step`-th image into a folder that has the class folders."""
    with open(spec_file, encoding="utf-8") as file:
        spec = Spec(**json.load(file))
    for i in range(first, spec.num_images, step):
        with open(os.path.join(folder, relative_path(i)), "wb") as out:
            out.write(draw(spec, i))


def as_json(spec: Spec) -> str:
    """The specification as text."""
    return json.dumps(asdict(spec), sort_keys=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
