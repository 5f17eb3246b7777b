"""Rows of measurements: JSON lines in benchmarks/results/, each with quantiles, hardware, versions and commit."""

import functools
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sslrun.runtime.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Minimum, quartiles, median, maximum and number of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    figures = {"min": min(values), "p25": low, "median": middle, "p75": high, "max": max(values)}
    return {**{name: round(value, 4) for name, value in figures.items()}, "count": len(values)}


def append_row(name: str, row: dict[str, Any], folder: Path = RESULTS) -> None:
    """Append a row to FOLDER/NAME.jsonl, with date, hardware, versions and commit; it is on the disk on return."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "date": time.strftime("%Y-%m-%d"), "environment": about()}) + "\n")
        file.flush()
        os.fsync(file.fileno())


@functools.cache
def about() -> dict[str, Any]:
    """Hardware, versions and commit."""
    return {key: value for key, value in environment().items() if key not in ("command", "host")}
