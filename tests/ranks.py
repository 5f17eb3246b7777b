"""Runs a function in several processes that are told who they are as `torchrun` tells them. One thread each."""

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = 180, silent: bool = False
) -> list[Any]:
    """Call a module-level function in `world_size` new processes and return its results in rank order.

    With a world size of 1 this is a fresh process without any launcher. Arguments and results must be picklable. What a
    failing process printed is the message of the error; the others are ended. `silent`: a line of DeepSpeed's log on
    the console is a failure.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder, "task")
        task.write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments)))
        processes, port = [], _free_port()
        for rank in range(world_size):
            with Path(folder, f"{rank}.log").open("wb") as log:
                command = [sys.executable, __file__, str(task), str(Path(folder, f"{rank}.result"))]
                environment = _environment(rank, world_size, port)
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        try:
            _wait(processes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
        logs = [Path(folder, f"{rank}.log").read_text(errors="replace") for rank in range(world_size)]
        failed = [rank for rank, process in enumerate(processes) if process.wait() != 0]
        if failed:
            codes = ", ".join(f"rank {rank}: {processes[rank].returncode}" for rank in failed)
            tails = "\n".join(f"--- rank {rank} ---\n{logs[rank][-4000:]}" for rank in range(world_size))
            raise AssertionError(f"{function.__qualname__} failed ({codes}; -9 was ended from here)\n{tails}")
        # Not any line: under load torch's own store may say that it tries again.
        chatter = [line for line in "".join(logs).splitlines() if "[INFO]" in line or "deepspeed" in line.lower()]
        assert not silent or not chatter, f"{function.__qualname__} printed:\n{chatter}"
        return [pickle.loads(Path(folder, f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Until all have ended, or one has failed, or time is up."""
    while any(process.poll() is None for process in processes):
        if any(process.poll() not in (None, 0) for process in processes):
            time.sleep(0.5)  # the others often say why
            return
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launcher}
    path = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "tests"), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    if world_size > 1:
        values = (rank, world_size, rank, world_size, "127.0.0.1", port)
        environment |= {key: str(value) for key, value in zip(launcher, values, strict=True)}
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _main(task: str, result: str) -> None:
    import importlib

    module, name, arguments = pickle.loads(Path(task).read_bytes())
    value = getattr(importlib.import_module(module), name)(*arguments)
    Path(result).write_bytes(pickle.dumps(value))


if __name__ == "__main__":
    _main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as sslrun.cli.start does, and for its reason
