"""A rank that is lost or hangs is named, and the others leave in order with exit code 1."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import small_run
from ranks import run_ranks
from sslrun.runtime import distributed, heartbeat

TIMEOUT_S = 3.0
PATIENCE_S = 400  # of the tests, on a machine that does other things as well


def step(number: int, vote: distributed.Vote) -> None:
    heartbeat.at("thinking", number)
    time.sleep(0.2)
    heartbeat.at("voting")
    vote.cast(0)


@heartbeat.naming_lost_ranks()
def lose(rank: int, how: str) -> None:
    """Steps on all ranks; one of them is lost in step 3."""
    distributed.init(torch.device("cpu"), TIMEOUT_S)
    vote = distributed.Vote(torch.device("cpu"))
    for number in range(1, 10):
        heartbeat.at("thinking", number)
        if number == 3 and distributed.rank() == rank:
            if how == "hangs":
                time.sleep(1e6)
            os.kill(os.getpid(), getattr(signal, how))
        step(number, vote)


@pytest.mark.parametrize(
    ("rank", "how", "code", "line"),
    [
        (
            2,
            "hangs",
            1,
            r"error: rank 2 on host \S+ has not come back from step 3 \(thinking\) for \d s \(engine.timeout_s",
        ),
        (
            0,
            "SIGSTOP",
            -9,
            r"error: rank 0 on host \S+ has not come back from step 3.* for \d s: its process has",
        ),
    ],
)
def test_ranks_leave_with_one_line_that_names_the_one_that_is_missing(rank, how, code, line):
    with pytest.raises(AssertionError) as failure:
        run_ranks(lose, 3, rank, how, timeout_s=30)
    text = str(failure.value)
    codes = {int(number): int(code) for number, code in re.findall(r"rank (\d): (-?\d+)[,;]", text.splitlines()[0])}
    assert codes == {0: 1, 1: 1, 2: 1, rank: code}, text  # -9: what has started it ends it at last
    assert len(re.findall(line, text)) == 1 and text.count("error:") == 1 and "Traceback" not in text, text


def leave_one_by_one() -> float:
    """The ranks leave at different times, rank 0 first; returns how long that took."""
    distributed.init(torch.device("cpu"), TIMEOUT_S)
    vote = distributed.Vote(torch.device("cpu"))
    for number in range(1, 5):
        step(number, vote)
        time.sleep(0.5 * TIMEOUT_S if number == 4 and distributed.rank() == 1 else 0)  # slow, but not missing
    begin = time.monotonic()
    distributed.shutdown()
    return time.monotonic() - begin


def test_a_slow_rank_and_an_end_in_order_are_no_loss():
    first, *_ = run_ranks(leave_one_by_one, 3, timeout_s=30, silent=True)
    assert first > 0.5  # it has waited for rank 1, since the store is in its process


def come(absent: int) -> None:
    if distributed.rank() == absent:
        time.sleep(300)
    distributed.init(torch.device("cpu"), 15.0)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("absent", "line"),
    [
        (2, "error: rank 2 of 3 has not connected within 15 s (engine.timeout_s)"),
        (0, "error: rank 0 does not listen on port "),
    ],
)
def test_a_rank_that_does_not_come_is_named(absent, line):
    with pytest.raises(AssertionError) as failure:
        run_ranks(come, 3, absent, timeout_s=300)
    text = str(failure.value)
    assert text.count(line) == text.count("error:") == 1 and "Traceback" not in text, text


@heartbeat.naming_lost_ranks()
def fail_on_rank_1() -> None:
    distributed.init(torch.device("cpu"), 60.0)
    vote = distributed.Vote(torch.device("cpu"))
    try:
        for number in range(1, 5):
            step(number, vote)
            assert number < 3 or distributed.rank() != 1, "this is why"
    except AssertionError as error:
        distributed.leave(type(error), error, error.__traceback__)
        time.sleep(15)  # `run_ranks` ends the others soon after the first that ends
        raise


@pytest.mark.nightly
def test_the_error_of_a_rank_is_the_reason_of_the_others():
    with pytest.raises(AssertionError) as failure:
        run_ranks(fail_on_rank_1, 3, timeout_s=60)
    text = str(failure.value)
    assert len(re.findall(r"error: rank 1 on host \S+ ended in step [34]: AssertionError: this is why", text)) == 1, (
        text
    )


def launched(launcher: str, ranks: int, words: list[str]) -> subprocess.Popen[str]:
    """A training of several ranks. "plain": each is a process of its own, as under srun, that nobody looks after."""
    script = str(small_run.ROOT / "bin/sslrun")
    port = str(small_run.free_port())
    options = {"torchrun": "--nproc_per_node", "deepspeed": "--num_accelerators"}
    starts = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
        "deepspeed": [str(Path(sys.executable).parent / "deepspeed")],
    }
    if launcher in starts:
        return small_run.start(
            [*starts[launcher], options[launcher], str(ranks), "--master_port", port, script, *words]
        )
    variables = f"WORLD_SIZE={ranks} LOCAL_WORLD_SIZE={ranks} MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"
    command = f"{variables} RANK=$rank LOCAL_RANK=$rank {shlex.join([sys.executable, script, *words])}"
    each = f'for rank in {" ".join(map(str, range(ranks)))}; do ({command}; echo "rank $rank: $?") & done; wait'
    return small_run.start(["bash", "-c", each])


def pid_of(rank: int, recipe: Path) -> int:
    """The process that trains a recipe as a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words, variables = ((path / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            if str(recipe).encode() in words and f"RANK={rank}".encode() in variables:
                return int(path.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("launcher", "ranks", "lost", "number"),
    [
        ("torchrun", 2, 1, signal.SIGKILL),
        ("torchrun", 2, 0, signal.SIGSTOP),
        ("deepspeed", 2, 0, signal.SIGKILL),
        ("deepspeed", 2, 1, signal.SIGSTOP),
        ("plain", 3, 2, signal.SIGKILL),
        ("plain", 3, 0, signal.SIGKILL),
        ("plain", 3, 0, signal.SIGSTOP),
    ],
)
def test_a_training_that_loses_a_rank_records_which(tmp_path, images, launcher, ranks, lost, number):
    recipe = small_run.write_recipe(tmp_path, images, steps=5000)
    settings = [f"global_batch={8 * ranks}", "monitor.knn_interval=0", "engine.timeout_s=20"]
    process = launched(launcher, ranks, [str(recipe), *(word for one in settings for word in ("--set", one))])
    run = tmp_path / "runs/small"
    small_run.wait_until(lambda: small_run.last_step(run) >= 6, process, PATIENCE_S)
    pid = pid_of(lost, recipe)
    begin = time.monotonic()
    os.kill(pid, number)
    small_run.wait_until(
        lambda: json.loads((run / "state.json").read_text())["state"] != "running", process, PATIENCE_S
    )
    took_s = time.monotonic() - begin
    if number == signal.SIGSTOP:
        time.sleep(2)
        os.kill(pid, signal.SIGKILL)
    _, output = small_run.finish(process, PATIENCE_S)
    state = json.loads((run / "state.json").read_text())
    line = rf"rank {lost} on host \S+ has not come back from step [\d,]+.* for \d+ s: its process has "
    assert (state["state"], state["exit_code"]) == ("failed", 1) and re.match(line, state["error"]), (state, output)
    assert output.count(f"error: {state['error']}") == output.count("error: ") == 1, output
    assert "sslrun/" not in "".join(re.findall(r'File "(.*)"', output)) and "c10" not in output, output
    assert took_s < 120 and (launcher != "plain" or output.count(": 1\n") == ranks - 1), output


@pytest.mark.nightly
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "plain"])
def test_a_training_that_ends_or_is_preempted_says_nothing_of_it(tmp_path, images, launcher):
    recipe = small_run.write_recipe(tmp_path, images, steps=5000)
    run = tmp_path / "runs/small"
    words = [str(recipe), "--set", "engine.timeout_s=60"]
    process = launched(launcher, 2, words)
    small_run.wait_until(lambda: small_run.last_step(run) >= 6, process, PATIENCE_S)
    os.kill(pid_of(1, recipe), signal.SIGTERM)
    _, stopped = small_run.finish(process, PATIENCE_S)
    assert json.loads((run / "state.json").read_text())["exit_code"] == 75
    step = max(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))
    process = launched(launcher, 2, [*words, "--resume", "--set", f"max_iters={step + 4}"])
    code, done = small_run.finish(process, PATIENCE_S)
    assert json.loads((run / "state.json").read_text())["state"] == "done" and code == 0, done
    assert "error: " not in stopped + done and "come back" not in stopped + done, stopped + done
