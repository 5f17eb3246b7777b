"""Signals to real processes: the flag, the exit codes, the second Ctrl-C, and handlers that come back."""

import signal
import subprocess
import time

import pytest

import small_run
from sslrun.runtime.signals import StopSignals

# A loop of short steps that saves, slowly, when a signal stops it.
LOOP = """
import sys, time
from sslrun.runtime.signals import StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    while not stop.exit_code:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(float(sys.argv[1]))
    print("saved", flush=True)
sys.exit(stop.exit_code)
"""


def started(save_s: float) -> subprocess.Popen[str]:
    process = small_run.python(LOOP, save_s, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGTERM], 75),
        ([signal.SIGUSR1], 75),
        ([signal.SIGHUP], 75),
        ([signal.SIGINT], 130),
        ([signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM], 75),
        ([signal.SIGINT, signal.SIGTERM], 130),
        ([signal.SIGTERM, signal.SIGINT], 75),
        ([signal.SIGINT, signal.SIGINT], 130),  # the same Ctrl-C, from the terminal and from a launcher
    ],
)
def test_the_loop_saves_and_leaves_with_the_code(signals, code):
    process = started(save_s=0.3)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)
    out, _ = process.communicate(timeout=20)
    assert (out, process.returncode) == ("saving\nsaved\n", code)


def test_a_second_ctrl_c_leaves_at_once():
    process = started(save_s=30)
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - begin < 5
    assert out == "saving\n" and "KeyboardInterrupt" in err and process.returncode != 0


def test_a_hang_up_that_is_ignored_stays_ignored():
    """`nohup` ignores it, so that a run outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.exit_code == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_old_handlers_come_back_also_after_an_error():
    calls = []
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: calls.append(1)) for number in numbers}
    try:
        with pytest.raises(RuntimeError), StopSignals() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.exit_code == 75 and calls == []
            raise RuntimeError
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert calls == [1, 1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
