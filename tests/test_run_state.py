"""What a checkpoint says beside its tensors: older ones are read, others refused."""

import pytest

from sslrun import run_state
from sslrun.errors import UsageError
from sslrun.run_state import RunState
from sslrun.runtime import checkpoint

STATE = {"step": 4, "num_samples": 9, "step_metrics": {"steps": 0, "sums": {}}, "bad_samples": {}}


def saved(folder, **more):
    return checkpoint.save(folder, 4, {"model": {}, "optimizer": {}}, STATE | more)


def test_a_checkpoint_from_before_stops_were_heard_in_measurements_was_measured(tmp_path):
    assert run_state.load(saved(tmp_path))[1] == RunState(**STATE, is_measured=True)
    assert run_state.load(saved(tmp_path / "stopped", is_measured=False))[1].is_measured is False


@pytest.mark.parametrize("more", [{"is_measured": 1}, {"is_measured": None}, {"is_there": True}])
def test_another_state_is_refused(tmp_path, more):
    with pytest.raises(UsageError, match="is not the state of a run"):
        run_state.load(saved(tmp_path, **more))
