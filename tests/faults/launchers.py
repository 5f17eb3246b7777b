"""Starts a run by each launcher, sends a signal to one of its processes, and observes how everything ends.

observe(CASES[0], folder, images) -> a row for the table of docs/cluster.md
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import small_run
from sslrun.runtime import checkpoint
from sslrun.runtime.run_files import RunFiles

RANKS = 2
# Runs bin/sslrun as a rank does, and leaves the process id and the exit code in a folder: a launcher hides the code.
RANK = """
import os, runpy, sys
from pathlib import Path
folder, script, rank = Path({folder!r}), {script!r}, os.environ.get("RANK", "starter")
(folder / f"pid.{{rank}}").write_text(str(os.getpid()))
def leaving(code, leave=os._exit):
    (folder / f"code.{{rank}}").write_text(str(code))
    leave(code)
os._exit = leaving
try:
    if rank == "starter":  # it starts this file again, which has the name of the program
        sys.path.insert(0, str(Path(script).parents[1] / "engine"))
        from sslrun.cli import start
        start()
    sys.argv[0] = script
    runpy.run_path(script, run_name="__main__")
except Exception:  # Python ends with 1
    (folder / f"code.{{rank}}").write_text("1")
    raise
"""


@dataclass(frozen=True)
class Case:
    """One signal to one process.

    Attributes:
        launcher: "none", "nohup", "devices" (`--devices 2`), "torchrun" or "deepspeed".
        signal: name without SIG.
        to: "process" or "launcher" (what the user started), "child launcher" (of deepspeed, on each node), "group" (the
            process group of what the user started, as Ctrl-C in a terminal), "rank" (rank 1).
    """

    launcher: str
    signal: str
    to: str

    @property
    def name(self) -> str:
        return f"{self.launcher}: {self.signal} to {self.to}"


def _cases() -> list[Case]:
    cases = [Case("none", name, "process") for name in ("TERM", "USR1", "HUP", "INT", "KILL")]
    cases += [Case("nohup", name, "process") for name in ("HUP", "TERM")]
    for launcher, targets in (
        ("devices", ("launcher", "group", "rank")),
        ("torchrun", ("launcher", "group", "rank")),
        ("deepspeed", ("launcher", "child launcher", "group", "rank")),
    ):
        for to in targets:
            cases += [Case(launcher, name, to) for name in ("TERM", "INT", "USR1", "HUP", "KILL")]
    return cases


CASES = _cases()


def observe(case: Case, folder: Path, images: Path) -> dict[str, Any]:
    """What a case does to a run that is between its steps, as a row.

    The row has: `launcher_code`, exit code of what the user started; `rank_codes`, "killed" for a rank that left none;
    `state` and `state_code` of state.json as `sslrun runs` shows them; `wait_code`, of `sslrun runs --wait`; `saved`,
    whether a checkpoint holds the last step; `goes_on`, whether the run took no notice.
    """
    recipe = small_run.write_recipe(folder, images, steps=100_000)
    text = recipe.read_text().replace("interval = 4\nby", "interval = 1000000\nby")
    recipe.write_text(text.replace("interval = 3", "interval = 1").replace("knn_interval = 1", "knn_interval = 0"))
    run = folder / "runs" / recipe.stem
    with open(folder / "output", "w") as output:
        command, environment = _command(case.launcher, folder, recipe), small_run.environment()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    ranks: dict[int, int] = {}
    parent = 0
    try:
        _wait(lambda: small_run.last_step(run) >= 3, 120, process)
        is_alone = case.launcher in ("none", "nohup")
        ranks = {0: process.pid} if is_alone else {r: int((folder / f"pid.{r}").read_text()) for r in range(RANKS)}
        parent = _parent(ranks[0])
        target = {"rank": ranks.get(1), "child launcher": parent}.get(case.to, process.pid)
        (os.killpg if case.to == "group" else os.kill)(target, signal.Signals[f"SIG{case.signal}"])
        goes_on = _goes_on(run, process, ranks)
        if goes_on:
            return {"case": case.name, "goes_on": True}
        code = process.wait(timeout=60)
        _wait(lambda: not any(is_alive(pid) for pid in ranks.values()), 60)
        return {"case": case.name, "launcher_code": code} | _ended(folder, run, is_alone)
    finally:
        process.kill()
        process.wait()
        for pid in {parent, *ranks.values()} - {0, os.getpid(), process.pid}:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def _command(launcher: str, folder: Path, recipe: Path) -> list[str]:
    script = str(small_run.ROOT / "bin/sslrun")
    if launcher in ("none", "nohup"):
        return [*(["nohup"] if launcher == "nohup" else []), sys.executable, script, str(recipe)]
    rank = folder / "sslrun"
    rank.write_text(RANK.format(folder=str(folder), script=script))
    if launcher == "devices":
        return [sys.executable, str(rank), str(recipe), "--devices", str(RANKS)]
    port = str(small_run.free_port())
    start = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS)],
        "deepspeed": [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(RANKS)],
    }[launcher]
    return [*start, "--master_port", port, str(rank), str(recipe)]


def _goes_on(run: Path, process: subprocess.Popen[bytes], ranks: dict[int, int]) -> bool:
    """Whether the run still writes rows some seconds after the signal."""
    deadline = time.monotonic() + 6
    while time.monotonic() < deadline:
        if process.poll() is not None or not all(is_alive(pid) for pid in ranks.values()):
            return False
        time.sleep(0.1)
    step = small_run.last_step(run)
    time.sleep(2)
    return small_run.last_step(run) > step


def _ended(folder: Path, run: Path, is_alone: bool) -> dict[str, Any]:
    files = RunFiles(run)
    code_files = [] if is_alone else [folder / f"code.{rank}" for rank in range(RANKS)]
    newest = checkpoint.newest_good(files.checkpoints)
    waited = subprocess.run(
        [sys.executable, str(small_run.ROOT / "bin/sslrun"), "runs", "--wait", str(run)], capture_output=True
    )
    return {
        "rank_codes": [int(file.read_text()) if file.exists() else "killed" for file in code_files],
        "state": files.status(),
        "state_code": files.state().get("exit_code"),
        "wait_code": waited.returncode,
        "saved": newest is not None and int(newest.name[-8:]) >= small_run.last_step(run),
    }


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _wait(condition: Callable[[], bool], timeout_s: float, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        assert process is None or process.poll() is None, f"the run ended with {process.returncode}"
        time.sleep(0.02)
