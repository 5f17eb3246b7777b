"""Checks of the numbers in a constructor's arguments. Each raises ValueError for the first that is not as expected."""

import math
from collections.abc import Callable, Mapping

from sslrun.scheduled import Number, extremes


def require_positive(**sizes: int) -> None:
    """Sizes of 1 or more: torch accepts layers of 0 channels."""
    _require(sizes, lambda size: size >= 1, "1 or more")


def require_not_negative(**values: Number) -> None:
    """Numbers of 0 or more."""
    _require(values, lambda value: value >= 0, "0 or more")


def require_fraction(**values: Number) -> None:
    """Numbers from 0 to 1."""
    _require(values, lambda value: 0 <= value <= 1, "0 to 1")


def require_rate(**rates: float) -> None:
    """Rates of dropout and the like, from 0 to below 1."""
    _require(rates, lambda rate: 0 <= rate < 1, "0 to below 1")


def require_temperature(**temperatures: Number) -> None:
    """Finite numbers above 0."""
    _require(temperatures, lambda temperature: 0 < temperature < math.inf, "a finite number above 0")


def _require(values: Mapping[str, Number], holds: Callable[[float], bool], expected: str) -> None:
    for name, number in values.items():
        for value in extremes(number):
            if not holds(value):
                raise ValueError(f"{name} is {value}, expected {expected}")
