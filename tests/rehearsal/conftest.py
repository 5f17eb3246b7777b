"""The played device, compiled once for the tests of a process."""

from pathlib import Path

import pytest

from rehearsal.processes import CannotPlay, compiled


@pytest.fixture(scope="session")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the played device; skips where it cannot be made."""
    try:
        return compiled(tmp_path_factory.mktemp("played"))
    except CannotPlay as reason:
        pytest.skip(f"no CUDA device can be played: {reason}")
