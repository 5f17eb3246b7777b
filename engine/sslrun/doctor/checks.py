"""All checks of `sslrun doctor`, functions without arguments; `python -m sslrun.doctor.checks NAME` runs one.

A check says what works with a `Finding`, or raises; then its error's last line is what the doctor says. No library is
imported before its check runs.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict

from sslrun.doctor import Finding
from sslrun.doctor.computing import collectives, torch_compile, triton_kernel
from sslrun.doctor.machine import c_compiler, cuda, disk, driver, libraries, memory
from sslrun.doctor.running import decoding, deepspeed, training
from sslrun.errors import UsageError

ALL: tuple[Callable[[], Finding], ...] = (
    libraries, driver, cuda, memory, disk, c_compiler, decoding, triton_kernel, torch_compile, collectives, deepspeed,
    training,
)  # fmt: skip


def main(name: str) -> int:
    """Run a check and write its finding; the last line of stderr says why there is none."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    (check,) = (check for check in ALL if check.__name__ == name)
    try:
        finding = check()
    except UsageError as error:
        print(error, file=sys.stderr)
        return 1
    answers.write(json.dumps(asdict(finding)) + "\n")
    answers.flush()
    os._exit(0)  # the destructors of libraries are not what is asked


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
