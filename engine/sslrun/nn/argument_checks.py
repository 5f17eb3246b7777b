"""Checks of the numbers in a constructor's arguments."""

import math


def require_positive(**sizes: int) -> None:
    """Raises ValueError for the first size below 1, since torch accepts layers of 0 channels."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, expected 1 or more")


def require_not_negative(**values: float) -> None:
    """Raises ValueError for the first value below 0."""
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{name} is {value}, expected 0 or more")


def require_fraction(**values: float) -> None:
    """Raises ValueError for the first value that is not 0 to 1."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, expected 0 to 1")


def require_rate(**rates: float) -> None:
    """Raises ValueError for the first rate that is not 0 to below 1."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} is {rate}, expected 0 to below 1")


def require_temperature(**temperatures: float) -> None:
    """Raises ValueError for the first temperature that is not a finite number above 0."""
    for name, temperature in temperatures.items():
        if not 0 < temperature < math.inf:
            raise ValueError(f"{name} is {temperature}, expected a finite number above 0")
