"""The commands of "Two nodes" in docs/cluster.md, executed on two nodes: a node is cut off, and the job goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import documents
import small_run
from sslrun.runtime import checkpoint
from sslrun.runtime.run_files import RunFiles
from two_nodes import ADDRESSES, HOSTS, Nodes, is_running, two_nodes

PAGE = small_run.ROOT / "docs/cluster.md"
RANKS = 2  # of each node; the page has 4
TIMEOUT_S = 20.0  # of the ranks; without a beat for so long, a rank is lost
GRACE_S = 30.0  # from then on: a verdict is made, read and recorded
LOST_B = r"error: ranks 2-3 on host nodeB have not come back from step \d+ .*nodeB is cut off"
LOST_A = r"error: rank 0 on host nodeA has not come back from step \d+ .*(ended|cut off)$"
PATIENCE_S = 1800.0  # of the test, on a machine that does other things as well


def block(language: str, word: str) -> str:
    """The only block of the page with a word, for nodes of `RANKS` ranks."""
    (text,) = (block.text for block in documents.blocks(PAGE) if block.language == language and word in block.text)
    return text.replace("slots=4", f"slots={RANKS}").replace("per-node 4", f"per-node {RANKS}")


def command(text: str, node: int, recipe: Path) -> list[str]:
    program, *words = re.sub(r"\bR\b", str(node), re.sub(r"\bA\b", ADDRESSES[0], text)).split()
    places = {"bin/sslrun": str(small_run.ROOT / "bin/sslrun"), "configs/mocov2.toml": str(recipe)}
    return [str(Path(sys.executable).parent / program), *(places.get(word, word) for word in words)]


def write_recipe(folder: Path, images: Path) -> Path:
    """For four ranks, and so long that it does not end."""
    recipe = small_run.write_recipe(folder, images, steps=100_000)
    text = recipe.read_text().replace("samples_per_gpu = 8", "samples_per_gpu = 4")
    recipe.write_text(text.replace("interval = 3", "interval = 1").replace("knn_interval = 1", "knn_interval = 0"))
    return recipe


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with two_nodes(tmp_path) as made:
        yield made


Started = list["subprocess.Popen[bytes]"]


def by_launcher(nodes: Nodes, folder: Path, launcher: str, recipe: Path, options: list[str]) -> Started:
    """The command of the page on both nodes; each writes to the file `node0` or `node1`."""
    text, started = block("bash", f"{launcher} -"), []
    for node in (0, 1):
        with open(folder / f"node{node}", "w") as output:
            words = [*command(text, node, recipe), *options]
            started.append(nodes.start(node, words, output, folder, small_run.environment()))
    return started


def train_until(step: int, run: RunFiles, folder: Path, started: Started) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while small_run.last_step(run.path) < step:
        if time.monotonic() > deadline or any(process.poll() is not None for process in started):
            codes(folder, started, 0.0)
            raise AssertionError("\n---\n".join(printed(folder)))
        time.sleep(0.1)


def printed(folder: Path) -> list[str]:
    return [(folder / f"node{node}").read_text() for node in (0, 1)]


def codes(folder: Path, started: Started, within_s: float) -> list[int]:
    """The exit codes of what was started, after all have ended by themselves."""
    deadline = time.monotonic() + within_s
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in started]
    except subprocess.TimeoutExpired:
        raise AssertionError("\n---\n".join(printed(folder))) from None
    finally:
        for process in started:
            process.terminate()  # it ends its ranks


def assert_in_time(nodes: Nodes, lost: Iterable[int]) -> None:
    """Every rank that is left, on whatever node, ends within the timeout and a grace, by a clock that stands while this
    process does not get the processor. What launchers do before and after is not in it.

    Args:
        nodes: one of them has just been cut off.
        lost: numbers of the ranks that have been killed with it.
    """
    left = {rank: pid for node in (0, 1) for rank, pid in nodes.ranks(node).items() if rank not in lost}
    assert left.keys() == set(range(2 * RANKS)) - set(lost)
    clock_s, ended_s, now = 0.0, dict[int, float](), time.monotonic()
    while len(ended_s) < len(left) and clock_s < TIMEOUT_S + GRACE_S:
        time.sleep(0.1)
        clock_s, now = clock_s + min(time.monotonic() - now, 0.2), time.monotonic()
        for rank in left.keys() - ended_s.keys():
            if not is_running(left[rank]):
                ended_s[rank] = clock_s
    print(f"ranks ended after {ended_s}")
    assert ended_s.keys() == left.keys(), f"after {clock_s:.0f} s ranks {left.keys() - ended_s.keys()} still run"


@pytest.mark.nightly
@pytest.mark.parametrize(("launcher", "cut"), [("deepspeed", 0), ("deepspeed", 1), ("torchrun", 0), ("torchrun", 1)])
def test_a_run_of_two_nodes_outlives_a_cut(launcher, cut, tmp_path, images, nodes):
    (tmp_path / "hosts").write_text(block("text", "slots"))
    recipe, run = write_recipe(tmp_path, images), RunFiles(tmp_path / "runs/small")
    words = ["--set", f"engine.timeout_s={TIMEOUT_S}"]
    started = by_launcher(nodes, tmp_path, launcher, recipe, words)
    train_until(9, run, tmp_path, started)

    nodes.cut(cut)
    assert_in_time(nodes, lost=())
    assert codes(tmp_path, started, PATIENCE_S) == [1, 1], printed(tmp_path)
    first, second = printed(tmp_path)
    assert re.search(LOST_B, first) and re.search(LOST_A, second, re.MULTILINE), first + second
    assert launcher == "torchrun" or "Traceback" not in first + second  # torchrun prints one of its own
    assert run.status() == "failed" and "host nodeB" in run.state()["error"]

    nodes.mend(cut)
    goes_on(nodes, tmp_path, launcher, recipe, run, words)


@pytest.mark.nightly
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_run_outlives_the_node_of_rank_0(launcher, tmp_path, images, nodes):
    """It loses its power: who is left names it, and records that the run has failed."""
    (tmp_path / "hosts").write_text(block("text", "slots"))
    recipe, run = write_recipe(tmp_path, images), RunFiles(tmp_path / "runs/small")
    words = ["--set", f"engine.timeout_s={TIMEOUT_S}"]
    started = by_launcher(nodes, tmp_path, launcher, recipe, words)
    train_until(9, run, tmp_path, started)

    nodes.lose(0)
    assert_in_time(nodes, lost=range(RANKS))
    assert codes(tmp_path, started, PATIENCE_S) == [-signal.SIGKILL, 1], printed(tmp_path)
    second = printed(tmp_path)[1]
    assert re.search(LOST_A, second, re.MULTILINE), second
    assert len(re.findall(r"^(?:\[rank \d\] )?error: ", second, re.MULTILINE)) == 1, (
        "one rank alone prints it: " + second
    )
    assert run.status() == "failed" and "host nodeA" in run.state()["error"], run.state()

    nodes.mend(0)
    goes_on(nodes, tmp_path, launcher, recipe, run, words)


def goes_on(nodes: Nodes, folder: Path, launcher: str, recipe: Path, run: RunFiles, words: list[str]) -> None:
    """The same commands with --resume bring the run to its end, with rank 0 on node 0 again."""
    last = small_run.last_step(run.path) + 6
    started = by_launcher(nodes, folder, launcher, recipe, [*words, "--resume", "--set", f"max_iters={last}"])
    assert codes(folder, started, PATIENCE_S) == [0, 0], printed(folder)
    assert run.status() == "done" and small_run.last_step(run.path) == last
    assert "on 4 x cpu" in (run.path / "log.txt").read_text()
    assert [(start["ranks"], start["nodes"]) for start in run.starts()] == [(4, 2)]
    assert "done: " in printed(folder)[0] and "done: " not in printed(folder)[1], "rank 0 is on node 0"


@pytest.mark.nightly
def test_the_batch_script_outlives_the_end_of_its_time_and_a_cut(tmp_path, images, nodes):
    """As Slurm starts it: a signal shortly before the end, after which the job is queued again; then a lost node."""
    recipe, run = write_recipe(tmp_path, images), RunFiles(tmp_path / "runs/small")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/srun").symlink_to(Path(__file__).with_name("stand_in_srun.py"))
    (tmp_path / "bin/scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/queued\n')
    (tmp_path / "bin/scontrol").chmod(0o755)
    entering = {host: nodes.entering(node, small_run.ROOT) for node, host in enumerate(HOSTS)}
    environment = small_run.environment() | {"SLURM_JOB_ID": "7", "NODES": json.dumps(entering)}
    environment["PATH"] = f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def submit(*options: str) -> Started:
        words = ["bash", "bin/sslrun.slurm", str(recipe), "--set", f"engine.timeout_s={TIMEOUT_S}", *options]
        with open(tmp_path / "node0", "w") as output:
            (tmp_path / "node1").touch()
            where = {"cwd": small_run.ROOT, "env": environment, "stdout": output, "stderr": output}
            return [subprocess.Popen(words, start_new_session=True, **where)]

    started = submit()
    train_until(3, run, tmp_path, started)
    (srun,) = Path(f"/proc/{started[0].pid}/task/{started[0].pid}/children").read_text().split()
    os.kill(int(srun), signal.SIGUSR1)
    assert codes(tmp_path, started, PATIENCE_S) == [75], printed(tmp_path)
    assert (tmp_path / "queued").read_text() == "requeue 7\n" and run.status() == "pre-empted"

    last = small_run.last_step(run.path)
    started = submit()
    train_until(last + 6, run, tmp_path, started)
    nodes.cut(1)
    assert codes(tmp_path, started, PATIENCE_S) == [1], printed(tmp_path)
    text = printed(tmp_path)[0]
    assert re.search(LOST_B, text) and re.search(LOST_A, text, re.MULTILINE), text
    assert (tmp_path / "queued").read_text() == "requeue 7\n" and run.status() == "failed"

    nodes.mend(1)
    last = small_run.last_step(run.path) + 6
    assert codes(tmp_path, submit("--set", f"max_iters={last}"), PATIENCE_S) == [0], printed(tmp_path)
    assert run.status() == "done" and small_run.last_step(run.path) == last


@pytest.mark.nightly
def test_ctrl_c_on_the_first_node_stops_both(tmp_path, images, nodes):
    (tmp_path / "hosts").write_text(block("text", "slots"))
    recipe, run = write_recipe(tmp_path, images), RunFiles(tmp_path / "runs/small")
    started = by_launcher(nodes, tmp_path, "deepspeed", recipe, [])
    train_until(3, run, tmp_path, started)
    os.killpg(started[0].pid, signal.SIGINT)
    codes(tmp_path, started, PATIENCE_S)
    assert (run.status(), run.state()["exit_code"]) == ("interrupted", 130), printed(tmp_path)
    newest = checkpoint.newest_good(run.checkpoints)
    assert newest is not None and int(newest.name[-8:]) >= small_run.last_step(run.path)
    assert "error: " not in printed(tmp_path)[1], printed(tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("of_node_1", "expected"),
    [
        (
            ("--hostfile hosts", "--hostfile other"),
            "error: rank 0 on nodeA was started as one of 4 ranks, but rank 2 on nodeB as one of 3: all nodes",
        ),
        (
            ("--node_rank R", "--node_rank 0"),
            r"error: rank [01] of 4 was started twice, on node[AB] and on node[AB]: ",
        ),
    ],
)
def test_nodes_that_are_started_differently_are_one_line(tmp_path, images, nodes, of_node_1, expected):
    recipe = small_run.write_recipe(tmp_path, images, steps=2)
    (tmp_path / "hosts").write_text(block("text", "slots"))
    (tmp_path / "other").write_text(block("text", "slots").replace(f"nodeB slots={RANKS}", "nodeB slots=1"))
    text, started = block("bash", "deepspeed -"), []
    for node, line in ((0, text), (1, text.replace(*of_node_1))):
        with open(tmp_path / f"node{node}", "w") as output:
            words = command(line, node, recipe)
            started.append(nodes.start(node, words, output, tmp_path, small_run.environment()))
    assert codes(tmp_path, started, PATIENCE_S) == [2, 2], printed(tmp_path)
    lines = re.findall(r"^error: .*", "\n".join(printed(tmp_path)), re.MULTILINE)
    assert len(set(lines)) == 1 and re.match(expected, lines[0]), printed(tmp_path)
