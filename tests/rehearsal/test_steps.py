"""Whole optimizer steps of every method on fake CUDA tensors: no waits, nothing misplaced, the expected memory.

By day the recipes of `BY_DAY` run with two BatchNorm groups, or one for each rank, and MoCo v2 with its whole batch of
256; nightly all of them run with both.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from rehearsal import faults
from rehearsal.cases import CASES, MOCOV2, Case
from rehearsal.checks import problems
from rehearsal.processes import ROOT, run

ROWS = ROOT / "benchmarks/results/rehearsal.jsonl"
PARTS = 2  # processes by day: each imports the engine once
BY_DAY = ("mocov2", "swav", "dino", "mae", "odc", "accumulation", "simclr on 8 ranks", "npid on 8 ranks")


def committed(size: str) -> dict[str, dict[str, Any]]:
    """The committed rows of one size, by case."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    return {row["case"]: row for row in rows if row["size"] == size}


def check(found: list[dict[str, Any]], size: str) -> None:
    rows = committed(size)
    told = {each["case"]: problems(CASES[each["case"]], each, rows[each["case"]]) for each in found}
    assert not any(told.values()), "\n".join(f"{name}: {line}" for name, lines in told.items() for line in lines)


@pytest.mark.parametrize("part", range(PARTS))
def test_short_steps(played: Path, part: int):
    names = list(BY_DAY[part::PARTS])
    found = run(played, "rehearsal.step", *names)
    assert [each["case"] for each in found] == names
    check(found, "short")


def test_a_step_of_mocov2_at_its_real_size(played: Path):
    (found,) = run(played, "rehearsal.step", "--full", "mocov2")
    assert found["plan"]["global_batch"] == found["plan"]["machine"]["micro_batch"] == 256
    check([found], "full")


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in CASES if name not in BY_DAY])
def test_short_steps_of_the_night(played: Path, name: str):
    check(run(played, "rehearsal.step", name), "short")


@pytest.mark.nightly
@pytest.mark.parametrize("name", CASES)
def test_full_steps(played: Path, name: str):
    check(run(played, "rehearsal.step", "--full", name, timeout_s=1800), "full")


@pytest.mark.nightly
def test_planted_faults_are_found(played: Path):
    for found in run(played, "rehearsal.step", *faults.CASES):
        name = found["case"]
        told = problems(faults.CASES[name], found)
        expected = faults.FOUND[name]
        if expected is None:
            assert told == []
        else:
            assert any(expected in line for line in told), f"{name}: {told or 'nothing was found'}"


@pytest.mark.parametrize("factor", [0.85, 1.2])
def test_a_wrong_estimate_of_memory_is_found(factor: float):
    counted = {name: {} for name in ("waits", "late_reads", "on_cpu", "misplaced", "float32_products")}
    found = {**counted, "peak_bytes": 100, "expected_bytes": 100 * factor, "launches": 1}
    assert len(problems(Case(MOCOV2), found)) == 1
    assert problems(Case(MOCOV2), found | {"expected_bytes": 100}) == []


def test_twice_the_launches_are_found():
    counted = {name: {} for name in ("waits", "late_reads", "on_cpu", "misplaced", "float32_products")}
    found = {**counted, "peak_bytes": 1, "expected_bytes": 1, "launches": 200}
    assert len(problems(Case(MOCOV2), found, {"launches": 100})) == 1
    assert problems(Case(MOCOV2), found, {"launches": 190}) == []


def test_every_method_is_rehearsed():
    from sslrun.config import load
    from sslrun.contract import Method
    from sslrun.session import build

    assert build is not None  # imports the methods
    shipped = {name for name, kind in Method.registry.items() if kind.__module__.startswith("sslrun.methods.")}
    rehearsed = {load(str(ROOT / case.config), case.settings).values["model"]["type"] for case in CASES.values()}
    assert shipped <= rehearsed
