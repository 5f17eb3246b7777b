"""Whether the launcher that started this process still lives.

A killed `torchrun`, or a killed front end of `deepspeed`, leaves its ranks running: nobody signals them, and nobody
waits for them. A rank therefore looks at the processes above it, as far up as they are launchers. Its shell or batch
job is not among them: it may end while a run goes on.
"""

import os
import time
from pathlib import Path

_LAUNCHERS = (b"torchrun", b"torch.distributed", b"torch/distributed", b"deepspeed")
_INTERVAL_S = 1.0
STARTER = "SSLRUN_STARTER"  # the environment variable with the process id of our own launcher (`starter.py`)


class Launcher:
    """The launchers above this process when the object was made. Without /proc there are none."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}  # a process -> its parent, which is a launcher
        self._looked_at = time.monotonic()
        process = os.getpid()
        while (parent := _parent(process)) is not None and _is_launcher(parent):
            self._parents[process] = parent
            process = parent

    def is_gone(self) -> bool:
        """Whether one of them has ended. Looks at most once a second, so that a training loop can ask at every step."""
        now = time.monotonic()
        if not self._parents or now - self._looked_at < _INTERVAL_S:
            return False
        self._looked_at = now
        return any(_parent(process) != parent for process, parent in self._parents.items())


def _parent(process: int) -> int | None:
    """The parent of a process; None if there is no such process."""
    try:
        status = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return None
    return int(status.rpartition(b")")[2].split()[1])  # "pid (name) state parent ...": the name may hold anything


def _is_launcher(process: int) -> bool:
    """Whether a process is our starter, or Python running a launcher's script or module; a shell whose script starts
    one is not."""
    if str(process) == os.environ.get(STARTER):
        return True
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    program = next((word for word in words[1:] if not word.startswith(b"-")), b"")  # after -u, -m
    return os.path.basename(words[0]).startswith(b"python") and any(name in program for name in _LAUNCHERS)
