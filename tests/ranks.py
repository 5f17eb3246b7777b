"""Runs a function in several processes with the environment variables that `torchrun` sets; one thread each.

The processes are forked from one that has imported torch and the engine and does nothing else, so that a rank starts in
0.1 s instead of 3 s. This process starts with the first rank and ends with the tests.
"""

import functools
import importlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("engine", "kernels", "tests", "tests/methods", "tests/faults")  # on the path of every rank
# By ranks (the last of them by DeepSpeed). None starts a thread, prints, or draws a random number.
IMPORTED = ("sslrun.training", "sslrun.data.graph", "nvidia.dali.fn", "pytest", "torch._inductor.compile_fx")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = 180, silent: bool = False
) -> list[Any]:
    """Call a module-level function in `world_size` new processes and return its results in rank order.

    With a world size of 1 this is a process without any launcher. Arguments and results must be picklable. What a
    failing process printed is the message of the error; the others are ended. `silent`: a line of DeepSpeed's log on
    the console is a failure.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "task").write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments)))
        codes = _ordered({"folder": folder, "environments": _environments(world_size), "timeout_s": timeout_s})
        logs = [Path(folder, f"{rank}.log").read_text(errors="replace") for rank in range(world_size)]
        if any(codes):
            failed = ", ".join(f"rank {rank}: {code}" for rank, code in enumerate(codes) if code)
            tails = "\n".join(f"--- rank {rank} ---\n{log[-4000:]}" for rank, log in enumerate(logs))
            raise AssertionError(f"{function.__qualname__} failed ({failed}; -9 was killed by the tests)\n{tails}")
        # Not any line: under load torch's own store may say that it tries again.
        chatter = [line for line in "".join(logs).splitlines() if "[INFO]" in line or "deepspeed" in line.lower()]
        assert not silent or not chatter, f"{function.__qualname__} printed:\n{chatter}"
        return [pickle.loads(Path(folder, f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _environments(world_size: int) -> list[dict[str, str]]:
    """Environment of each rank: that of this process, and the variables of a launcher."""
    common = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    path = [*(str(ROOT / folder) for folder in SOURCES), common.get("PYTHONPATH", "")]
    common |= {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    common["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as sslrun.cli.start sets it
    if world_size == 1:
        return [common]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [(rank, world_size, rank, world_size, "127.0.0.1", port) for rank in range(world_size)]
    return [common | {key: str(value) for key, value in zip(LAUNCHER, values, strict=True)} for values in ranks]


def _ordered(order: dict[str, Any]) -> list[int]:
    """Have the ranks run; returns their exit codes."""
    process = _process()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer, f"what forks the ranks ended, exit code {process.wait()}"
    return json.loads(answer)


@functools.cache
def _process() -> subprocess.Popen[str]:
    (environment,) = _environments(1)
    command = [sys.executable, __file__]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _serve() -> None:
    """The process that forks: it reads orders, one per line, runs them and answers with exit codes."""
    for module in IMPORTED:
        importlib.import_module(module)
    for line in sys.stdin:
        print(json.dumps(_run(**json.loads(line))), flush=True)


def _run(folder: str, environments: list[dict[str, str]], timeout_s: float) -> list[int]:
    """Wait until all ranks have ended, one has failed, or time is up; then end the others."""
    pids = [_fork(Path(folder), rank, environment) for rank, environment in enumerate(environments)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(codes) < len(pids) and time.monotonic() < deadline:
            time.sleep(0.01)
            for pid in set(pids) - set(codes):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            if any(codes.values()):
                deadline = min(deadline, time.monotonic() + 0.5)  # the others often say why
    finally:
        for pid in set(pids) - set(codes):
            os.kill(pid, signal.SIGKILL)
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [codes[pid] for pid in pids]


def _fork(folder: Path, rank: int, environment: dict[str, str]) -> int:
    return os.fork() or _rank(folder, rank, environment)


def _rank(folder: Path, rank: int, environment: dict[str, str]) -> NoReturn:
    code = 1
    try:
        output = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
        for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
            os.dup2(descriptor, target)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
        module, name, arguments = pickle.loads((folder / "task").read_bytes())
        value = getattr(importlib.import_module(module), name)(*arguments)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(value))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # as sslrun.cli.start does, and for its reason


if __name__ == "__main__":
    _serve()
