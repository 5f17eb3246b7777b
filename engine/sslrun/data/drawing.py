"""Draws the pictures of the `Shapes` source: numpy and Pillow only, so that it can run as a program of its own.

A picture shows a handful of equal silhouettes, like biscuits on a cloth. The silhouette is the class; everything else
is chance: how many, where, how large, how turned, each one's colour, the cloth's colours and weave, where the light
stands, how bright and how warm it is. Silhouettes have equal areas, so the amount of ink tells nothing.

    python drawing.py FOLDER SPEC.json FIRST STEP     draws pictures FIRST, FIRST + STEP, ... of the specification
"""

import colorsys
import io
import json
import math
import os
import sys
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

_SUPERSAMPLING = 4
_QUALITY = 92


@dataclass(frozen=True)
class Spec:
    """What to draw; two equal ones give equal files.

    Attributes:
        num_images: in turns of the ten classes.
        size: height and width in pixels.
        stream: number that separates splits.
        seed: of the drawing.
        rotation: smallest and largest turn of a silhouette, degrees.
        lighting: smallest and largest brightness of the light.
    """

    num_images: int
    size: int
    stream: int
    seed: int
    rotation: tuple[float, float]
    lighting: tuple[float, float]


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
    """Where picture i lies below the folder."""
    return os.path.join(CLASS_NAMES[i % len(CLASS_NAMES)], f"{i:06d}.jpg")


def draw(spec: Spec, i: int) -> bytes:
    """Picture i as a JPEG file, a pure function of its arguments."""
    random = np.random.Generator(np.random.Philox(key=spec.seed % 2**64, counter=[0, 0, spec.stream, i]))
    size = spec.size
    light_angle = _between(random, 0, 2 * math.pi)
    light = np.array([math.cos(light_angle), math.sin(light_angle)])
    canvas = _cloth(random, size)
    mask, colours = _silhouettes(random, spec, i % len(CLASS_NAMES))
    height = np.asarray(mask.filter(ImageFilter.GaussianBlur(size / 45)), dtype=np.float32) / 255
    shadow = mask.filter(ImageFilter.GaussianBlur(size / 28))
    shift = np.rint(light * _between(random, 0.02, 0.06) * size).astype(int)
    shade = np.roll(np.asarray(shadow, dtype=np.float32) / 255, shift[::-1], axis=(0, 1))
    canvas *= 1 - _between(random, 0.25, 0.6) * shade[..., None]
    ink = np.asarray(mask, dtype=np.float32)[..., None] / 255
    down, right = np.gradient(height)
    relief = 1 - _between(random, 1.0, 3.5) * (right * light[0] + down * light[1]) * size / 80
    canvas += ink * (colours * relief[..., None] - canvas)
    canvas *= _lamp(random, spec, light)
    canvas += (random.random(canvas.shape, dtype=np.float32) - 0.5) * np.float32(_between(random, 0.0, 0.06))
    pixels = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY, subsampling=0)
    return file.getvalue()


def _between(random: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * random.random()


def _colour(random: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    hsv = random.random(), _between(random, *saturation), _between(random, *value)
    return np.array(colorsys.hsv_to_rgb(*hsv), dtype=np.float32)


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    line = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    return line[None, :], line[:, None]


def _cloth(random: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) background: two colours mixed by a weave."""
    first, second = (_colour(random, (0.0, 0.75), (0.2, 0.95)) for _ in range(2))
    weave = random.integers(5)
    x, y = _grid(size)
    turn = _between(random, 0, math.pi)
    u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    frequency = _between(random, 12, 45)
    if weave == 0:
        mix = 0.5 + u
    elif weave == 1:
        mix = np.clip(0.5 + 2 * np.sin(u * frequency), 0, 1)
    elif weave == 2:
        mix = np.clip(0.5 + 2 * np.sin(u * frequency) * np.sin(v * frequency), 0, 1)
    elif weave == 3:
        mix = np.clip(2.5 * (np.cos(u * frequency) + np.cos(v * frequency)) - 2.5, 0, 1)
    else:
        cells = int(random.integers(4, 20))
        noise = Image.fromarray(random.integers(0, 256, (cells, cells), dtype=np.uint8))
        mix = np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    strength = np.float32(_between(random, 0.25, 0.9))
    return first + strength * mix[..., None].astype(np.float32) * (second - first)


def _silhouettes(random: np.random.Generator, spec: Spec, label: int) -> tuple[Image.Image, np.ndarray]:
    """Coverage of the silhouettes, 0 to 255, and the colour (size, size, 3) that belongs to each place."""
    size, scale = spec.size, _SUPERSAMPLING
    places = _places(random)
    mask = Image.new("L", (size * scale, size * scale))
    pen = ImageDraw.Draw(mask)
    for x, y, reach in places:
        turn = math.radians(_between(random, *spec.rotation))
        matrix = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        side = reach * _between(random, 0.85, 1.15)
        for part, fill in zip(_SILHOUETTES[label], (255, 0), strict=False):
            points = (part @ matrix * side + [x, y]) * size * scale
            pen.polygon([tuple(point) for point in points.tolist()], fill=fill)
    columns, rows = _grid(size)
    distances = np.stack([(columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 for x, y, _ in places])
    palette = np.stack([_colour(random, (0.35, 1.0), (0.45, 1.0)) for _ in places])
    return mask.reduce(scale), palette[distances.argmin(axis=0)]


def _places(random: np.random.Generator) -> list[tuple[float, float, float]]:
    """x, y and reach of one to five silhouettes that do not touch, in shares of the picture."""
    wanted = int(random.integers(2, 6))
    reach = _between(random, 0.2, 0.27) if wanted > 3 else _between(random, 0.26, 0.38)
    places: list[tuple[float, float, float]] = []
    for x, y in random.random((24, 2)).tolist():
        x, y = 0.1 + 0.8 * x, 0.1 + 0.8 * y
        if len(places) < wanted and all(math.hypot(x - a, y - b) > 1.5 * reach for a, b, _ in places):
            places.append((x, y, reach))
    return places


def _lamp(random: np.random.Generator, spec: Spec, light: np.ndarray) -> np.ndarray:
    """(size, size, 3) brightness of the light: stronger where it comes from, warm or cold."""
    x, y = _grid(spec.size)
    slope = _between(random, 0.0, 0.9)
    warmth = _between(random, -0.12, 0.12)
    field = _between(random, *spec.lighting) * (1 - slope * (x * light[0] + y * light[1]))
    return field[..., None].astype(np.float32) * np.array([1 + warmth, 1, 1 - warmth], dtype=np.float32)


def main(folder: str, spec_file: str, first: int, step: int) -> None:
    """Draw every `step`-th picture into a folder that has the class folders."""
    with open(spec_file, encoding="utf-8") as file:
        spec = Spec(**json.load(file))
    for i in range(first, spec.num_images, step):
        with open(os.path.join(folder, relative_path(i)), "wb") as out:
            out.write(draw(spec, i))


def as_json(spec: Spec) -> str:
    """The specification as text, for a file and for its fingerprint."""
    return json.dumps(asdict(spec), sort_keys=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
