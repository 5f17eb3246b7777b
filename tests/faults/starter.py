"""Starts `bin/sslrun` many times, each in a process forked from one that has imported torch and the engine.

That saves the three seconds of importing. What is forked runs the script bin/sslrun itself, below the library
`faults.c`, which does nothing until the environment names a fault.
"""

import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import ranks

SCRIPT = str(ranks.ROOT / "bin/sslrun")


def start(words: Sequence[str], output: Path, settings: Mapping[str, str] | None = None) -> int:
    """Start `bin/sslrun WORDS...` in a session of its own; returns its process id.

    Args:
        words: arguments.
        output: file that receives stdout and stderr.
        settings: environment variables beside those of the tests.
    """
    return _ordered({"words": list(words), "output": str(output), "settings": dict(settings or {})})


def wait(pid: int, timeout_s: float = 120) -> int:
    """The exit code of a started process, negative if a signal ended it. At the timeout it is killed."""
    return _ordered({"pid": pid, "timeout_s": timeout_s})


def run(words: Sequence[str], output: Path, settings: Mapping[str, str] | None = None, timeout_s: float = 120) -> int:
    """Start, wait, return the exit code."""
    return wait(start(words, output, settings), timeout_s)


@functools.cache
def _server() -> subprocess.Popen[str]:
    library = Path(tempfile.mkdtemp(prefix="faults")) / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    (environment,) = ranks._environments(1)
    environment |= {"LD_PRELOAD": str(library), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, __file__]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ordered(order: dict[str, object]) -> int:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, f"what starts the runs ended, exit code {server.wait()}"
    return int(answer)


def _serve() -> None:
    """Reads orders, one per line; answers with a process id or an exit code."""
    for module in ranks.IMPORTED:
        importlib.import_module(module)
    for line in sys.stdin:
        order = json.loads(line)
        if "pid" in order:
            print(_code(**order), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _become(**order)
            return
        print(pid, flush=True)


def _code(pid: int, timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _become(words: list[str], output: str, settings: dict[str, str]) -> None:
    """Runs the script in this process. It ends as the script ends it."""
    os.setsid()
    printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (printed, 1), (printed, 2)):
        os.dup2(descriptor, target)
    os.environ.update(settings)
    sys.argv = [SCRIPT, *words]
    runpy.run_path(SCRIPT, run_name="__main__")


if __name__ == "__main__":
    _serve()
