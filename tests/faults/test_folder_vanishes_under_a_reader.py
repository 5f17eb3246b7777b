"""A run folder that vanishes while a verb reads it: one line, and it is not made anew."""

import shutil
from pathlib import Path

import pytest

from small_run import NAME, call
from sslrun import measure
from sslrun.export import export, publish
from sslrun.report import page
from sslrun.runtime import checkpoint, durable


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run of 6 steps, with checkpoints at the steps 4 and 6."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / NAME))


VERBS = {
    "report": ["report", "RUN", "--no-images"],
    "eval": ["eval", "spectrum", "RUN"],
    "eval of a checkpoint": ["eval", "spectrum", "RUN/checkpoints/step_00000006"],
    "export": ["export", "RUN", "--to", "safetensors", "-o", "RUN/encoder.safetensors"],
    "publish": ["publish", "RUN"],
}
# Where each of them is when the folder vanishes.
FIND, LOAD, FILES = (checkpoint, "find"), (checkpoint, "load"), (checkpoint, "_content")
MEASURE, RENDER, REPLACE = (measure, "frozen_encoder"), (page, "render"), (durable, "replace_file")
EXPORT, PUBLISH = (export, "verified"), (publish, "_write")
PLACES = {
    "report": (RENDER, REPLACE),
    "eval": (FIND, LOAD, FILES, MEASURE, REPLACE),
    "eval of a checkpoint": (FIND, LOAD, FILES, MEASURE, REPLACE),
    "export": (FIND, LOAD, FILES, EXPORT),
    "publish": (FIND, LOAD, FILES, PUBLISH),
}
CASES = [(verb, place) for verb, places in PLACES.items() for place in places]


@pytest.mark.parametrize(("verb", "place"), CASES, ids=[f"{verb}, {name}" for verb, (_, name) in CASES])
def test_one_line(run, capsys, monkeypatch, verb, place):
    original, vanished = getattr(*place), []

    def vanishing(*arguments, **options):
        vanished.append(run.exists())
        shutil.rmtree(run, ignore_errors=True)
        return original(*arguments, **options)

    monkeypatch.setattr(*place, vanishing)
    code, _, errors = call(capsys, *(word.replace("RUN", str(run)) for word in VERBS[verb]))
    assert vanished[0]
    assert code in (1, 2) and errors.count("error: ") == 1 and errors.splitlines()[-1].startswith("error: "), errors
    assert "Traceback" not in errors and not run.exists()
