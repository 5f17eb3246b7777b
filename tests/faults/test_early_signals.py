"""A signal in the first seconds of a start, before there is a run: one line and the exit code of that signal."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from small_run import ROOT, environment, finish, python, wait_until, write_recipe
from sslrun.cli import main
from sslrun.runtime import early_signals
from sslrun.runtime.signals import StopSignals

CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75, signal.SIGINT: 130}
# What the program of an installed package does.
SCRIPT = "import sys; sys.argv[0] = 'sslrun'; from sslrun.cli import start; sys.exit(start())"


def caught(process: subprocess.Popen[str], number: int) -> bool:
    """Whether a process answers a signal itself."""
    masks = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(masks[0].split()[1], 16) >> (number - 1) & 1)


def maps(process: subprocess.Popen[str], library: str) -> bool:
    return library in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.fixture
def start(tmp_path, images) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    recipe = write_recipe(tmp_path, images)
    processes = []

    def begin(*words: str, **options) -> subprocess.Popen[str]:
        command = [sys.executable, *(words or (str(ROOT / "bin/sslrun"),)), str(recipe)]
        settings = {**environment(), "PYTHONPATH": str(ROOT / "engine")}
        process = subprocess.Popen(
            command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", CODES)
def test_in_the_first_moment(start, tmp_path, number):
    process = start()
    wait_until(lambda: caught(process, signal.SIGHUP), process)  # the last one; the interpreter itself catches SIGINT
    process.send_signal(number)
    line = f"error: {signal.Signals(number).name} came before the run began: nothing to save\n"
    assert finish(process) == (CODES[number], line)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("words", [(), pytest.param(("-c", SCRIPT), marks=pytest.mark.nightly)])
def test_while_torch_is_imported(start, tmp_path, number, words):
    process = start(*words)
    wait_until(lambda: maps(process, "libtorch_cpu.so"), process)
    process.send_signal(number)
    line = f"error: {signal.Signals(number).name} came before the run began: nothing to save\n"
    assert finish(process) == (CODES[number], line)
    assert not (tmp_path / "runs").exists()


def test_a_hang_up_that_is_ignored_stays_ignored(start):
    """`nohup` ignores it, so that a run outlives its terminal."""
    process = start(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_until(lambda: caught(process, signal.SIGTERM) and caught(process, signal.SIGUSR1), process)
    process.send_signal(signal.SIGHUP)
    assert not caught(process, signal.SIGHUP) and process.poll() is None


@pytest.fixture
def entered() -> Iterator[None]:
    numbers = dict.fromkeys(CODES)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    early_signals.enter()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers() -> list:
    return [signal.getsignal(number) for number in CODES]


DEFAULT = [signal.SIG_DFL, signal.SIG_DFL, signal.SIG_DFL, signal.default_int_handler]


@pytest.mark.parametrize("words", [["list"], ["quickstart.toml", "--dry-run"], ["runs", "nowhere"], ["eval"]])
def test_verbs_that_do_not_train_keep_the_habits_of_the_shell(entered, words):
    assert handlers() == [early_signals._leave] * 4
    with contextlib.suppress(SystemExit):
        main(words)
    assert handlers() == DEFAULT


def test_a_training_that_is_refused_keeps_them_to_its_end(entered):
    assert main(["nowhere.toml"]) == 2
    assert handlers() == [early_signals._leave] * 4


# A process whose run has ended with code 1, and which takes its time to leave.
LEAVES = """
import sys, time
from sslrun.runtime import early_signals
from sslrun.runtime.signals import StopSignals
early_signals.enter()
with StopSignals():
    pass
print("leaving", flush=True)
time.sleep(0.5)
sys.exit(1)
"""


@pytest.mark.parametrize("number", CODES)
def test_a_signal_after_a_run_does_not_change_its_code(number):
    """As torchrun's SIGTERM to the ranks that are still leaving when the first one has left. Ctrl-C interrupts."""
    process = python(LEAVES, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "leaving\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    is_interrupted = number == signal.SIGINT
    assert process.returncode == (-signal.SIGINT if is_interrupted else 1), stderr
    assert ("KeyboardInterrupt" in stderr) == is_interrupted and "nothing to save" not in stderr


def test_a_program_that_is_no_command_gets_its_handlers_back(entered):
    early_signals.leave()
    with StopSignals():
        assert not set(handlers()) & {early_signals._leave, *DEFAULT}
    assert handlers() == DEFAULT
