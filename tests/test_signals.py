"""Signals to real processes: the flag, the exit codes, the second Ctrl-C, and handlers that come back."""

import os
import signal
import socket
import subprocess
import threading
import time

import pytest

import small_run
from sslrun import training
from sslrun.runtime import signals as module
from sslrun.runtime.signals import Stopped, StopSignals
from sslrun.runtime.stopping import stop_if_asked, stoppable
from sslrun.runtime.writer import Writer
from stopped_run import lock_twice

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


# Has nothing to save, and does not come back from where it is.
STUCK = """
import sys, time
from sslrun.runtime.signals import StopSignals
with StopSignals() as stop:
    stop.has_nothing_to_save, stop.raises = True, sys.argv[1] == "raises"
    stop.last_words += [lambda code: time.sleep(float(sys.argv[2])), lambda code: print("record", code)]
    stop.last_words.insert(0, lambda code: 1 / 0)
    print("ready", flush=True)
    while True:
        time.sleep(0.1)
"""


# The main thread does not return to Python in time, as in a collective whose other ranks have left.
IN_C = """
import hashlib
from sslrun.runtime.signals import StopSignals
with StopSignals() as stop:
    stop.last_words.append(lambda code: print("last words", flush=True))
    stop.records.append(lambda code: print("recorded", code, flush=True))
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_a_second_ctrl_c_is_recorded_also_if_the_process_cannot_leave():
    process = small_run.python(IN_C, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for pause_s in (0.1, 1.5, 0):  # the second one is the first one's echo
            process.send_signal(signal.SIGINT)
            time.sleep(pause_s)
        assert process.stdout.readline() == "recorded 130\n"
    finally:
        process.kill()
    assert process.communicate()[0] == ""


@pytest.mark.parametrize(
    ("raises", "last_words_s", "out", "code"),
    [
        ("raises", 0, "", 1),
        ("waits", 0, "record 75\n", 75),
        pytest.param("waits", 60, "", 75, marks=pytest.mark.nightly),
    ],  # storage hangs
)
def test_a_process_with_nothing_to_save_does_not_stay(raises, last_words_s, out, code):
    process = small_run.python(STUCK, raises, last_words_s, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=30)
    assert (printed, process.returncode, "Stopped: 75" in errors) == (out, code, raises == "raises")
    assert time.monotonic() - begin < 10


def test_signals_are_heard_by_a_thread_while_the_main_thread_is_in_c():
    """What is pending there is no Python handler's yet."""
    before = signal.set_wakeup_fd(-1)
    heard = []
    with StopSignals():
        timer = threading.Timer(0.2, lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.5), ask(heard)))
        timer.start()
        lock_twice(for_s=2.5)
        timer.join()
    assert heard == [75] and module.requested() == 0
    assert signal.set_wakeup_fd(-1) == -1
    signal.set_wakeup_fd(before)


def ask(heard: list[int]) -> None:
    heard.append(module.requested())


def test_what_a_forked_child_hears_is_not_for_its_parent():
    with StopSignals() as stop:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            os._exit(stop.exit_code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
        time.sleep(0.5)
        assert stop.exit_code == 0


def test_another_wakeup_descriptor_comes_back():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    before = signal.set_wakeup_fd(ours.fileno())
    try:
        with StopSignals():
            signal.raise_signal(signal.SIGTERM)
    finally:
        assert signal.set_wakeup_fd(before) == ours.fileno()
        ours.close()
        theirs.close()


def test_work_is_left_only_where_the_run_listens():
    with StopSignals() as stop:
        assert list(stoppable("abc")) == ["a", "b", "c"]
        signal.raise_signal(signal.SIGINT)
        stop_if_asked()  # in a step
        assert list(stoppable("abc")) == ["a", "b", "c"]
        with stop.listening(), pytest.raises(Stopped) as stopped:
            stop_if_asked()
        assert stopped.value.exit_code == 130 and not isinstance(stopped.value, Exception)
        with stop.listening(), pytest.raises(Stopped):
            next(stoppable("abc"))
        stop_if_asked()
    with pytest.raises(Stopped):
        stop_if_asked(75)


def test_a_look_comes_before_each_item_and_after_the_last_where_others_have_more():
    looks = []
    with StopSignals() as stop, stop.listening(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sslrun.runtime.distributed.largest", lambda code: looks.append(code) or 0)
        for count, most, expected in ((3, 0, 3), (3, 4, 4), (0, 2, 2), (3, 3, 3)):
            looks.clear()
            assert list(stoppable(range(count), most)) == list(range(count))
            assert len(looks) == expected


class Vote:
    """A vote that others have decided.

    Args:
        result: what a rank reads of it.
        is_late: whether that is of the step before.
    """

    def __init__(self, result: int, is_late: bool) -> None:
        self.result, self.is_late = result, is_late
        self.cast_values: list[int] = []

    def cast(self, value: int) -> int:
        self.cast_values.append(value)
        return self.result


@pytest.mark.parametrize(
    ("result", "is_late", "has_data", "asked", "cast", "saves"),
    [
        (75, False, True, 0, 0, True),
        (75, False, False, 75, 75, True),
        (75, True, True, 0, 0, True),
        (0, True, False, 75, 75 + training.TORN, False),  # the others have queued the step
        (75 + training.TORN, True, True, 0, 0, False),  # this rank has
        (130, True, False, 75, 75 + training.TORN, False),
    ],
)
def test_a_step_that_others_have_queued_is_not_saved(result, is_late, has_data, asked, cast, saves):
    vote, signals, writer, is_written = Vote(result, is_late), StopSignals(), Writer(), threading.Event()
    writer.start(lambda: (time.sleep(0.05), is_written.set()))
    signals.exit_code = asked
    with pytest.raises(Stopped) as stopped:
        training._stop_if_agreed(vote, signals, has_data, writer)
    assert stopped.value.exit_code in (75, 130)
    assert vote.cast_values == [cast] and signals.has_nothing_to_save is not saves
    assert saves or is_written.is_set(), "the process may be ended before its last save is on the disk"


def test_a_run_that_nobody_stops_goes_on():
    vote, signals = Vote(0, is_late=True), StopSignals()
    training._stop_if_agreed(vote, signals, True, Writer())
    assert not signals.has_nothing_to_save
