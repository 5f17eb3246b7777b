"""The kernels themselves, on the CPU: their tests once more, under Triton's interpreter.

A process of its own: the interpreter has to be on before a kernel is defined.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_kernels_pass_their_tests_interpreted():
    # Degenerate inputs make the interpreter's numpy speak, which a GPU does not.
    quiet = ["-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *quiet, "tests/kernels"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-20000:] + ran.stderr[-4000:]
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) > 300
