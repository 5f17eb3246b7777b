"""What follows DALI on the device, on fake CUDA tensors: no waits, and the hand-over to the stream of the step."""

from pathlib import Path

import pytest

from rehearsal.processes import run

BY_DAY = ("mocov2", "relative_loc", "deepcluster")  # all steps that a recipe has, and patches
NIGHTLY = ("swav", "byol", "simclr", "npid", "rotation_pred", "mocov3")


@pytest.mark.parametrize("names", [BY_DAY, pytest.param(NIGHTLY, marks=pytest.mark.nightly)])
def test_batches_are_made_and_handed_over_without_a_wait(played: Path, names: tuple[str, ...]):
    found = run(played, "rehearsal.data_path", *names)
    assert len(found) == 2 * len(names)
    for each in found:
        told = [*each["problems"], *each["waits"], *each["late_reads"], *each["misplaced"], *each["float32_products"]]
        assert not told, f"{each['case']}: {told}"
        assert each["launches"] > 0


def test_planted_faults_are_found(played: Path):
    faults = ("wait_event", "record_stream", "copy")
    found = run(played, "rehearsal.data_path", *(f"--fault={fault}" for fault in faults), "rotation_pred")
    forgotten, unrecorded, waited = found
    assert set(forgotten["problems"]) == {"the step's stream does not wait for the batch"}
    assert unrecorded["problems"] and all("may be freed" in problem for problem in unrecorded["problems"])
    assert waited["waits"] and not waited["problems"]
