"""Ranks whose launcher is killed save and end; a run whose shell ends goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import small_run
from sslrun.runtime import folder_lock

# Waits to be stopped, and writes the exit code to a file: nobody is left to ask for it.
RANK = """
import os, sys, time
from pathlib import Path
from sslrun.runtime.signals import StopSignals
with StopSignals() as stop:
    Path(sys.argv[1]).write_text(str(os.getpid()))
    while not stop.exit_code:
        time.sleep(0.01)
Path(sys.argv[2]).write_text(str(stop.exit_code))
"""
# Starts the command that is its arguments, and waits for it.
PARENT = "import subprocess, sys; subprocess.run(sys.argv[1:])"


def started(path: Path, process: subprocess.Popen) -> int:
    """The process id that a rank has written."""
    small_run.wait_until(lambda: path.exists() and path.read_text() != "", process)
    return int(path.read_text())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


@pytest.mark.parametrize(
    ("parents", "killed", "is_orphan"),
    [
        (["torchrun"], 0, True),
        (["deepspeed", "deepspeed.launcher.launch"], 0, True),
        (["deepspeed", "deepspeed.launcher.launch"], 1, True),
        (["shell", "torchrun"], 0, False),
        (["shell"], 0, False),
        (["bash", "torchrun"], 0, False),
    ],
)
def test_a_rank_whose_launcher_is_killed_ends_with_75(tmp_path, parents, killed, is_orphan):
    rank = tmp_path / "rank.py"
    rank.write_text(RANK)
    command = [sys.executable, str(rank), str(tmp_path / "pid"), str(tmp_path / "code")]
    for number, name in reversed(list(enumerate(parents))):
        if name == "bash":  # a script that starts a launcher is none
            command = ["bash", "-c", f"true; {shlex.join(command)}; true torchrun"]
            continue
        script = tmp_path / f"{number}" / name
        script.parent.mkdir()
        script.write_text(f"import os\nopen({str(script) + '.pid'!r}, 'w').write(str(os.getpid()))\n{PARENT}")
        command = [sys.executable, str(script), *command]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(small_run.ROOT / "engine")}, start_new_session=True
    )
    try:
        pid = started(tmp_path / "pid", process)
        name = parents[killed]
        target = process.pid if name == "bash" else int((tmp_path / f"{killed}" / f"{name}.pid").read_text())
        os.kill(target, signal.SIGKILL)
        assert ends(pid, within_s=10 if is_orphan else 2.5) == is_orphan
        if is_orphan:
            assert (tmp_path / "code").read_text() == "75"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("launcher", "number"),
    [("torchrun", signal.SIGUSR1), ("torchrun", signal.SIGKILL), ("deepspeed", signal.SIGTERM)],
)
def test_a_training_whose_launcher_is_killed_is_saved_and_releases_its_folder(tmp_path, images, launcher, number):
    recipe = small_run.write_recipe(tmp_path, images, steps=5000)
    port = str(small_run.free_port())
    start = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port],
        "deepspeed": [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--master_port", port],
    }[launcher]
    process = small_run.start([*start, str(small_run.ROOT / "bin/sslrun"), str(recipe)])
    run = tmp_path / "runs/small"
    small_run.wait_until(lambda: small_run.last_step(run) >= 6, process)
    assert folder_lock.is_held(run)
    os.kill(process.pid, number)
    deadline = time.monotonic() + 30
    while folder_lock.is_held(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["exit_code"]) == ("pre-empted", 75) and not folder_lock.is_held(run)
    assert ends(state["pid"], within_s=10)
    process.kill()
    process.communicate()
