"""Transforms that change the values of pixels and leave them where they are."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sslrun.data.transforms.base import Parameters, Transform, within
from sslrun.errors import UsageError

# Numbers of the jitter's operations, in the columns of `factors` and as the entries of `order`.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
JITTER = ("brightness", "contrast", "saturation", "hue")

# A Gaussian is cut here, in standard deviations: beyond, a tap is less than half a unit of the fixed point in use.
BLUR_REACH = 4.0


class ColorJitter(Transform):
    """Brightness, contrast, saturation and hue changed by random factors, in an order drawn for each image.

    A number x stands for the factors from max(0, 1 - x) to 1 + x (hue: turns from -x to x of the circle), as in
    torchvision; a list gives both ends. What is 0 is not done at all.

    Args:
        brightness: strength, 0 or more.
        contrast: strength, 0 or more.
        saturation: strength, 0 or more.
        hue: strength, 0 to 0.5.
        p: probability.
    """

    num_draws = 1 + 4 + 4

    def __init__(
        self,
        brightness: float | list[float] = 0.0,
        contrast: float | list[float] = 0.0,
        saturation: float | list[float] = 0.0,
        hue: float | list[float] = 0.0,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.ranges = np.array(
            [
                _jitter_range("brightness", brightness, 1.0, math.inf),
                _jitter_range("contrast", contrast, 1.0, math.inf),
                _jitter_range("saturation", saturation, 1.0, math.inf),
                _jitter_range("hue", hue, 0.0, 0.5),
            ]
        )
        neutral = np.array([1.0, 1.0, 1.0, 0.0])
        self.active = [k for k in range(4) if not (self.ranges[k] == neutral[k]).all()]

    def parameters(self, uniforms: np.ndarray, sizes: np.ndarray) -> Parameters:
        """Adds `order` (B, 4), the operations in the order they are done (-1: none), and `factors` (B, 4) by operation.

        Factors are float32, since that is what PIL blends with; hue is the whole steps of 1/255 turn that PIL adds.
        """
        apply = uniforms[:, 0] < self.p
        order = np.argsort(uniforms[:, 1:5], axis=1, kind="stable")
        factors = self.ranges[:, 0] + uniforms[:, 5:9] * (self.ranges[:, 1] - self.ranges[:, 0])
        factors[:, HUE] = np.trunc(factors[:, HUE] * 255.0)
        done = apply[:, None] & np.isin(order, self.active)
        factors = np.where(apply[:, None], factors, [1.0, 1.0, 1.0, 0.0])
        return {
            "apply": apply,
            "order": np.where(done, order, -1).astype(np.int32),
            "factors": factors.astype(np.float32),
        }

    def describe(self, numbers: Parameters) -> dict[str, Any]:
        factors = numbers["factors"].tolist()
        turn = {"hue_degrees": factors[HUE] * 360 / 255} if HUE in self.active else {}
        order = [JITTER[operation] for operation in numbers["order"] if operation >= 0]
        return {"order": order} | {JITTER[k]: factors[k] for k in self.active if k != HUE} | turn


class RandomGrayscale(Transform):
    """Every channel becomes the image's gray.

    Args:
        p: probability.
    """

    def __init__(self, p: float = 0.1) -> None:
        super().__init__(p=p)


class GaussianBlur(Transform):
    """A Gaussian whose width is drawn, uniform between the two ends; the border is reflected.

    Args:
        sigma_min: smallest standard deviation in pixels.
        sigma_max: largest standard deviation in pixels.
        p: probability.
    """

    num_draws = 2

    def __init__(self, sigma_min: float = 0.1, sigma_max: float = 2.0, p: float = 0.5) -> None:
        super().__init__(p=p)
        if not 0.0 < sigma_min <= sigma_max:
            raise UsageError(
                f"sigma_min and sigma_max must satisfy 0 < sigma_min <= sigma_max, not {sigma_min}, {sigma_max}"
            )
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def parameters(self, uniforms: np.ndarray, sizes: np.ndarray) -> Parameters:
        """Adds `sigma` (B,), pixels."""
        sigma = self.sigma_min + uniforms[:, 1] * (self.sigma_max - self.sigma_min)
        return {"apply": uniforms[:, 0] < self.p, "sigma": sigma.astype(np.float32)}

    def describe(self, numbers: Parameters) -> dict[str, Any]:
        return {"sigma_px": float(numbers["sigma"])}


class Solarization(Transform):
    """Values at or above a threshold are inverted.

    Args:
        threshold: 0 to 255.
        p: probability.
    """

    def __init__(self, threshold: int = 128, p: float = 0.2) -> None:
        super().__init__(p=p)
        if not 0 <= threshold <= 255:
            raise UsageError(f"threshold must lie between 0 and 255, not {threshold}")
        self.threshold = threshold

    def describe(self, numbers: Parameters) -> dict[str, Any]:
        return {"threshold": self.threshold}


class Normalize(Transform):
    """(x / 255 - mean) / std for each channel. Last in its list, but for a flip; without it pixels are x / 255.

    Args:
        mean: one number for each of R, G, B.
        std: one number for each of R, G, B.
    """

    num_draws = 0

    def __init__(
        self, mean: Sequence[float] = (0.485, 0.456, 0.406), std: Sequence[float] = (0.229, 0.224, 0.225)
    ) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UsageError("mean and std must each have three numbers, those of std above 0")
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))


def _jitter_range(name: str, value: float | Sequence[float], neutral: float, most: float) -> tuple[float, float]:
    if isinstance(value, Sequence):
        return within(name, value, neutral - 1.0 if neutral else -most, most)
    if not 0 <= value <= most:
        raise UsageError(f"{name} must lie between 0 and {most}, not {value}")
    return (max(0.0, neutral - value), neutral + value) if neutral else (-value, value)
