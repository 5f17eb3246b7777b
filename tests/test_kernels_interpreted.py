"""Runs the kernels themselves on the CPU: the tests of tests/kernels once more, under Triton's interpreter.

Each file runs in a process of its own, because the interpreter must be on before a kernel is defined.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FILES = sorted(path for path in (ROOT / "tests/kernels").glob("test_*.py") if path.stem != "test_ahead_of_time")
BY_DAY = ("test_contrastive", "test_ema_update", "test_views_stage")  # the others run nightly alone


def test_there_is_a_file_for_each_family_of_kernels():
    assert len(FILES) >= 4


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7"),
    reason="the interpreter of Triton 3.6 makes scalars of arrays of one element, which numpy 2.4 refuses",
)
@pytest.mark.parametrize(
    ("path", "selection"),
    [
        pytest.param(
            path,
            selection,
            id=f"{path.stem}-{selection}",
            marks=[pytest.mark.nightly] * (selection == "nightly" or path.stem not in BY_DAY),
        )
        for path in FILES
        for selection in ("not nightly", "nightly")
    ],
)
def test_the_kernels_pass_their_tests_interpreted(path, selection):
    # numpy warns about degenerate inputs, which a GPU accepts silently.
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "-m", selection, str(path)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"{run.stdout[-10000:]}{run.stderr[-4000:]}"
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > (10 if selection == "not nightly" else 1)
