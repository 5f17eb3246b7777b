"""The kernels themselves, on the CPU: their tests once more, under Triton's interpreter.

In processes of their own, since the interpreter has to be on before a kernel is defined; two at a time.
"""

import functools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for path in (ROOT / "tests/kernels").glob("test_*.py") if path.stem != "test_ahead_of_time")


def interpreted(selection: str, path: Path) -> subprocess.CompletedProcess[str]:
    # Degenerate inputs make the interpreter's numpy speak, which a GPU does not.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "ignore::RuntimeWarning",
        "-p",
        "no:cacheprovider",
        "-m",
        selection,
        str(path),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("selection", ["not nightly", pytest.param("nightly", marks=pytest.mark.nightly)])
def test_the_kernels_pass_their_tests_interpreted(selection):
    with ThreadPoolExecutor(2) as pool:
        runs = dict(zip(FILES, pool.map(functools.partial(interpreted, selection), FILES), strict=True))
    assert len(runs) >= 4
    for path, run in runs.items():
        assert run.returncode == 0, f"{path.name}\n{run.stdout[-10000:]}{run.stderr[-4000:]}"
        assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 10, path.name
