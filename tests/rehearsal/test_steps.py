"""Whole optimizer steps on fake CUDA tensors, at the recipes' real sizes."""

from pathlib import Path

from rehearsal.processes import run


def test_a_step_of_mocov2(played: Path):
    found = run(played, "rehearsal.step", "configs/mocov2.toml")
    assert found["plan"]["machine"]["micro_batch"] == 256
    assert found["waits"] == {}
    assert sum(found["late_reads"].values()) == 1, "the finite flag, one step late"
    assert found["misplaced"] == {}
