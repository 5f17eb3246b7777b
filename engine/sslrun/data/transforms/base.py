"""What a transform is, and the checks of arguments that several share."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sslrun.config.component import Component
from sslrun.errors import UsageError

Parameters = dict[str, np.ndarray]


class Transform(Component, kind="transforms"):
    """One step of a view.

    Args:
        p: probability that an image is changed at all, 0 to 1.
    """

    num_draws: int = 1
    """Uniform draws that each image consumes, the first of which decides whether the transform applies."""

    view_draw: int | None = None
    """Which of its draws is none but says what view of its group it is: view v of V has (v + 0.5) / V there."""

    geometric: bool = False
    """Whether it only moves pixels (and so may be done before the colors, by other hands)."""

    def __init__(self, *, p: float = 1.0) -> None:
        if not 0.0 <= p <= 1.0:
            raise UsageError(f"p must lie between 0 and 1, not {p}")
        self.p = float(p)

    def parameters(self, uniforms: np.ndarray, sizes: np.ndarray) -> Parameters:
        """What to do to each image, as a pure function of its draws.

        Args:
            uniforms: (B, num_draws) in [0, 1).
            sizes: (B, 2) height and width of the images as they enter this transform.

        Returns:
            `apply`, (B,) bool, and the transform's own numbers, (B,) or (B, k). Where an image is left alone, its box,
            size, order and factors are such that using them changes nothing.
        """
        return {"apply": uniforms[:, 0] < self.p}

    def describe(self, numbers: Parameters) -> dict[str, Any]:
        """What it does to one image, for people and for JSON: plain values, names that end with the unit.

        Args:
            numbers: of `parameters`, one image's, to which the transform applies: numbers or (k,).
        """
        return {name: np.asarray(value).tolist() for name, value in numbers.items() if name != "apply"}

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        """Height and width that every image has afterwards; None where it differs from image to image.

        Args:
            size: what every image has before, or None.
        """
        return size


def pair_of_pixels(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of an argument that is one number for a square, or both."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise UsageError(f"{name} must be a number of pixels or [height, width], each at least 1, not {value}")
    return pair


def within(name: str, value: Sequence[float], least: float, most: float) -> tuple[float, float]:
    """Both ends of an argument `[smallest, largest]`."""
    if len(value) != 2 or not least <= value[0] <= value[1] <= most:
        raise UsageError(f"{name} must be [smallest, largest] within {least} and {most}, not {list(value)}")
    return float(value[0]), float(value[1])
