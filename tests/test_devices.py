"""`--devices N`: the ranks are one command. One exit code, every signal once, none left behind."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import small_run
from ranks import LAUNCHER
from sslrun.cli import main
from sslrun.errors import UsageError
from sslrun.runtime import distributed, starter
from sslrun.runtime.launcher import Launcher
from sslrun.runtime.starter import is_rank, number_of_ranks

# A starter whose program is the script RANK; LOST_S is shorter.
STARTER = """
import sys
from sslrun.runtime import early_signals, starter
early_signals.enter()
starter.LOST_S = 1.0
starter.words_of_program = lambda: [sys.executable, sys.argv[1]]
sys.exit(starter.run_ranks(sys.argv[2:], 2))
"""
# Writes what it gets into rank.N. Its word for each rank: the exit code of an end of its own, "saves" leaves some time
# after the first signal, "stays" never leaves.
RANK = """
import json, os, signal, sys, time
from sslrun.runtime import early_signals
rank = os.environ["RANK"]
if rank == "0":
    os.environ["CHILD"] = "1"
numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
heard = []
def hear(number, frame):
    heard.append(number)
    note()
def note():
    with open(f"rank.{rank}.new", "w") as file:
        json.dump({"heard": heard, "pid": os.getpid(), "environment": dict(os.environ)}, file)
    os.rename(f"rank.{rank}.new", f"rank.{rank}")
for number in numbers:
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, hear)
early_signals.enter()
note()
word = sys.argv[1].split(",")[int(rank)]
if word == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if word not in ("saves", "stays"):
    sys.exit(int(word))
while not heard or word == "stays":
    time.sleep(0.01)
time.sleep(0.5)
sys.exit(early_signals.CODES[heard[0]])
"""


class Started:
    """A starter of two ranks in a folder, with its terminal if it has one."""

    def __init__(self, folder: Path, words: str, terminal: bool, **options) -> None:
        self.folder = folder
        (folder / "rank.py").write_text(RANK)
        command = [sys.executable, "-c", STARTER, str(folder / "rank.py"), words]
        variables = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
        variables |= {"PYTHONPATH": str(small_run.ROOT / "engine")}
        self.terminal, inside = pty.openpty() if terminal else (-1, None)
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), inside) if terminal else {"stderr": subprocess.PIPE}
        if terminal:  # a session of its own, whose terminal it is
            command = [sys.executable, "-c", IN_TERMINAL, *command]
            options["start_new_session"] = True
        self.process = subprocess.Popen(command, cwd=folder, env=variables, text=True, **streams, **options)

    def ranks(self) -> list[dict]:
        """What each rank has written, when both have."""
        files = [self.folder / f"rank.{rank}" for rank in range(2)]
        small_run.wait_until(lambda: all(file.exists() for file in files), self.process)
        return [json.loads(file.read_text()) for file in files]

    def heard(self) -> list[list[int]]:
        return [rank["heard"] for rank in self.ranks()]

    def end(self) -> int:
        code = self.process.wait(timeout=20)
        for file in self.folder.glob("rank.?"):
            assert not Path(f"/proc/{json.loads(file.read_text())['pid']}").exists(), "a rank is left behind"
        return code


IN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Started]]:
    all_started = []

    def begin(words: str, terminal: bool = False, **options) -> Started:
        all_started.append(Started(tmp_path, words, terminal, **options))
        return all_started[-1]

    yield begin
    for started in all_started:
        started.process.kill()
        started.process.wait()
        for file in tmp_path.glob("rank.?"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(json.loads(file.read_text())["pid"], signal.SIGKILL)


@pytest.mark.parametrize(("codes", "expected"), [("0,0", 0), ("75,75", 75), ("3,3", 3), ("2,2", 2), ("0,1", 1)])
def test_the_exit_code_is_the_runs_own(start, codes, expected):
    started = start(codes)
    assert started.end() == expected
    for number, rank in enumerate(started.ranks()):
        variables = rank["environment"]
        assert (variables["RANK"], variables["LOCAL_RANK"]) == (str(number), str(number))
        assert (variables["WORLD_SIZE"], variables["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert variables["SSLRUN_STARTER"] == str(started.process.pid) and int(variables["MASTER_PORT"]) > 0
        assert int(variables["OMP_NUM_THREADS"]) >= 1


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1", "HUP"])
def test_every_rank_hears_a_signal_once(start, name):
    number = signal.Signals[f"SIG{name}"]
    started = start("saves,saves")
    assert started.heard() == [[], []]
    started.process.send_signal(number)
    assert started.end() == (130 if name == "INT" else 75)
    assert started.heard() == [[number], [number]]


def test_one_ctrl_c_of_a_terminal_is_heard_once(start):
    started = start("saves,saves", terminal=True)
    started.ranks()
    os.write(started.terminal, b"\x03")
    assert started.end() == 130
    assert started.heard() == [[signal.SIGINT]] * 2


def test_a_second_ctrl_c_ends_ranks_that_stay(start):
    started = start("stays,stays", terminal=True)
    started.ranks()
    os.write(started.terminal, b"\x03")
    small_run.wait_until(lambda: all(started.heard()), started.process)
    os.write(started.terminal, b"\x03")  # of the same moment: it does not count
    time.sleep(1.2)
    assert started.process.poll() is None and started.heard() == [[signal.SIGINT]] * 2
    begin = time.monotonic()
    os.write(started.terminal, b"\x03")
    assert started.end() == 130 and time.monotonic() - begin < 6
    assert started.heard() == [[signal.SIGINT] * 2] * 2


def test_signals_before_the_ranks_can_answer_are_not_lost(start):
    started = start("saves,saves")
    small_run.wait_until(lambda: children(started.process.pid) != [], started.process)
    started.process.send_signal(signal.SIGTERM)
    assert started.end() == 75
    assert started.heard() == [[signal.SIGTERM]] * 2


def test_a_killed_rank_is_named_and_the_others_end(start):
    started = start("saves,dies")
    assert started.process.communicate(timeout=20)[1] == "error: rank 1 was ended by SIGKILL\n"
    assert started.end() == 1 and started.heard() == [[signal.SIGTERM], []]


def test_a_hang_up_that_is_ignored_is_not_passed_on(start):
    started = start("saves,saves", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    started.ranks()
    started.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert started.process.poll() is None
    started.process.send_signal(signal.SIGTERM)
    assert started.end() == 75 and started.heard() == [[signal.SIGTERM]] * 2


def test_a_parent_that_ignores_its_children_does_not_hide_the_code(start):
    started = start("75,75", preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
    assert started.end() == 75


def test_ctrl_z_stops_the_ranks_too_until_they_go_on(start):
    started = start("saves,saves", terminal=True)
    pids = [started.process.pid, *(rank["pid"] for rank in started.ranks())]
    os.write(started.terminal, b"\x1a")
    small_run.wait_until(lambda: {state(pid) for pid in pids} == {"T"}, started.process)
    os.kill(started.process.pid, signal.SIGCONT)
    small_run.wait_until(lambda: "T" not in {state(pid) for pid in pids}, started.process)
    os.write(started.terminal, b"\x03")
    assert started.end() == 130


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize(
    ("words", "settings", "line"),
    [
        (["--devices", "2"], {"WORLD_SIZE": "2", "RANK": "0"}, "a launcher has started this process"),
        (["--devices", "2"], {"SLURM_STEP_NUM_TASKS": "2"}, "a launcher has started this process"),
        (["--devices", "0"], {}, "expected auto or a number from 1, not '0'"),
        (["--devices", "all"], {}, "expected auto or a number from 1, not 'all'"),
    ],
)
def test_what_cannot_be_is_one_line(capsys, monkeypatch, words, settings, line):
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    try:
        code = main(["nowhere.toml", *words])
    except SystemExit as left:
        code = left.code
    error = capsys.readouterr().err
    assert code == 2 and line in error and len(error.splitlines()) == 1


def test_more_ranks_than_gpus_are_one_line_on_every_rank(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="2 ranks are started on this machine, but torch sees 1 GPU: "):
        distributed.init(torch.device("cuda", 0))


@pytest.mark.parametrize(("gpus", "expected"), [("0", 1), ("1", 1), ("8", 8)])
def test_auto_is_the_number_of_gpus(monkeypatch, gpus, expected):
    counted = subprocess.CompletedProcess([], 0, stdout=f"{gpus}\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: counted)
    assert number_of_ranks("auto") == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 1),  # the recipe says so
        (["--set", "engine.device=auto"], 8),
        (["--devices", "3"], 3),  # the last one counts
    ],
)
def test_auto_counts_no_gpus_for_a_recipe_on_the_cpu(tmp_path, images, trained, monkeypatch, words, expected):
    recipe, asked = small_run.write_recipe(tmp_path, images), []

    def number_of_ranks(devices: int | str) -> int:
        asked.append(8 if devices == "auto" else devices)
        return 2

    monkeypatch.setattr(starter, "number_of_ranks", number_of_ranks)
    monkeypatch.setattr(starter, "run_ranks", lambda *_: 0)
    (checkpoint, *_) = (trained / "checkpoints").iterdir()
    for command in (
        ["train", recipe],
        ["eval", "knn", trained],
        ["eval", "knn", checkpoint],
        ["embed", tmp_path / "weights.pth", images, "-o", tmp_path / "x.npy", "--recipe", recipe],
    ):
        assert main([*map(str, command), "--devices", "auto", *words]) == 0
    assert asked == [expected] * 4


def test_an_inherited_mark_does_not_make_a_rank(monkeypatch):
    monkeypatch.setenv("SSLRUN_STARTER", "1")
    assert not is_rank()
    monkeypatch.setenv("SSLRUN_STARTER", str(os.getppid()))
    assert is_rank()


def test_a_rank_takes_its_starter_for_a_launcher(monkeypatch):
    monkeypatch.delenv("SSLRUN_STARTER", raising=False)
    assert Launcher()._parents == {}
    monkeypatch.setenv("SSLRUN_STARTER", str(os.getppid()))
    assert Launcher()._parents == {os.getpid(): os.getppid()}


def command(*words: object) -> list[str]:
    return [sys.executable, str(small_run.ROOT / "bin/sslrun"), *map(str, words)]


def test_two_ranks_plan_train_and_stop_as_one_command(tmp_path, images):
    recipe = small_run.write_recipe(tmp_path, images, steps=100_000)
    process = small_run.start(command(recipe, "--devices", 2))
    run = tmp_path / "runs/small"
    small_run.wait_until(lambda: small_run.last_step(run) >= 3, process)
    process.send_signal(signal.SIGTERM)
    code, output = small_run.finish(process)
    assert code == 75 and "small: all of 100000 steps on 2 x cpu" in output
    assert f"bin/sslrun train {recipe} --devices 2 --resume\n" in output
    assert json.loads((run / "state.json").read_text())["exit_code"] == 75


@pytest.mark.nightly
def test_a_dry_run_prints_the_plan_once(tmp_path, images):
    recipe = small_run.write_recipe(tmp_path, images)
    code, output = small_run.finish(small_run.start(command(recipe, "--devices", 2, "--dry-run")))
    assert code == 0 and len(re.findall(r"^steps ", output, re.MULTILINE)) == 1
    assert "= 2 rank(s) x 1 accumulated" in output


@pytest.mark.nightly
def test_resume_restart_and_evaluation_on_two_ranks(tmp_path, images):
    recipe = small_run.write_recipe(tmp_path, images, steps=4)
    straight = small_run.write_recipe(tmp_path, images, steps=6, name="straight")
    for words, expected in [
        ((recipe, "--devices", 2), 0),
        ((recipe, "--devices", 2), 2),  # the run is there
        ((recipe, "--devices", 2, "--resume", "--set", "max_iters=6"), 0),
        ((straight, "--devices", 2), 0),
        ((recipe, "--devices", 2, "--restart", "--set", "max_iters=4"), 0),
        (("eval", "linear", tmp_path / "runs/small", "--devices", 2, "--set", "eval.linear.epochs=2"), 0),
        (("eval", "knnn", tmp_path / "runs/small", "--devices", 2), 2),
    ]:
        code, output = small_run.finish(small_run.start(command(*words)))
        assert code == expected, output
        if expected == 2:
            assert len(output.splitlines()) == 1, output
    (result,) = (tmp_path / "runs/small/eval").glob("linear_*.json")
    assert json.loads(result.read_text())["ranks"] == 2
