"""What a rehearsed step must be like."""

from collections.abc import Iterable
from typing import Any

from rehearsal.cases import FLAG, VOTE, Case

MEMORY_TOLERANCE = 0.1
LAUNCHES_TOLERANCE = 0.25


def problems(case: Case, found: dict[str, Any], row: dict[str, Any] | None = None) -> list[str]:
    """One line for each thing that is wrong with a rehearsed step; none if it is as it should be.

    Args:
        case: what was rehearsed.
        found: a line of `rehearsal.step`.
        row: the committed counts of the same case, if they are to be compared.
    """
    if "error" in found:
        return [f"fails: {found['error']}"]
    late = [FLAG, *([VOTE] if case.ranks > 1 else []), *case.late]
    told = [f"waits: {place}" for place in found["waits"]]
    told += [f"reads late: {place}" for place in _others(found["late_reads"], late)]
    told += [f"reads late {times} times: {place}" for place, times in found["late_reads"].items() if times > 1]
    told += [f"computes in host memory: {place}" for place in _others(found["on_cpu"], (at for at, _ in case.on_host))]
    told += [f"misplaced: {place}" for place in found["misplaced"]]
    products = _others(found["float32_products"], (at for at, _ in case.float32))
    told += [f"multiplies in float32: {place}" for place in products]
    ratio = found["expected_bytes"] / found["peak_bytes"]
    if abs(ratio - 1) > MEMORY_TOLERANCE:
        told.append(f"memory: {found['expected_bytes']} bytes are expected, {found['peak_bytes']} are held")
    if row is not None and abs(found["launches"] / row["launches"] - 1) > LAUNCHES_TOLERANCE:
        told.append(f"{found['launches']} launches instead of {row['launches']}; if meant: make rehearsal-table")
    return told


def _others(places: Iterable[str], allowed: Iterable[str]) -> list[str]:
    """Places that are none of those that are allowed, each given by a part of its text."""
    known = list(allowed)
    return [place for place in places if not any(part in place for part in known)]
