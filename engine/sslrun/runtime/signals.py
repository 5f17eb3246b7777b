"""What stops a run: signals, and the end of its launcher.

The run hears them in one of three ways. Between steps all ranks look and agree (`distributed.Vote` in the loop,
`stopping.py` in what takes long between steps), save, and leave. Before the first step of a process there
is nothing to save, so the process leaves at once: by an exception, or, if it is in code that does not return to Python,
by a thread that ends it. A stop is therefore heard within 5 s, except in a step or in code that does not return to
Python after the first step: the run leaves after that. Code that also holds Python's global lock holds up the thread.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any

from sslrun.runtime import early_signals
from sslrun.runtime.early_signals import CODES, INTERRUPTED, PREEMPTED
from sslrun.runtime.launcher import Launcher

logger = logging.getLogger(__name__)

DEBOUNCE_S = 1.0  # one Ctrl-C may arrive twice: from the terminal and from the launcher that passes it on
GRACE_S = 2.0  # for leaving in order, before the process is ended
LAST_WORDS_S = 1.5  # for recording the end: the storage may hang as well
_LOOK_S = 0.5


class Stopped(BaseException):
    """The run was asked to stop. What had to be saved is saved, or is saved by who catches it.

    It is no Exception, as KeyboardInterrupt is none: libraries that catch every Exception must not take it for theirs.

    Attributes:
        exit_code: exit code of the process.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class StopSignals:
    """While it is entered, SIGTERM, SIGUSR1 and SIGHUP (exit code 75) and SIGINT (130) only set `exit_code`.

    The first signal decides the code. A second Ctrl-C raises KeyboardInterrupt, to leave without saving, and a third
    kills the process at once. A SIGHUP that is ignored on entering (`nohup`) stays ignored. The old handlers come back
    on leaving; in a process that only has to leave, see `early_signals.after_run`. A thread hears signals also while
    the main thread is in code that does not return to Python, and looks after the launcher.

    Attributes:
        exit_code: exit code of the process after saving; 0 as long as no signal has come and the launcher lives.
        has_nothing_to_save: whether the process may leave without saving. It then is ended `GRACE_S` after a signal,
            with `exit_code`, if it has not left by then.
        raises: whether the first signal raises Stopped while there is nothing to save: for runs of one process, in
            which nobody waits for this one.
        last_words: called with the exit code before the process is ended, from another thread than the main one.
        records: called then too; and `GRACE_S` after a second Ctrl-C, if the process has not left by then, because the
            starter of `--devices` will soon kill it. They record how the run ended.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self.has_nothing_to_save = self.raises = False
        self.last_words: list[Callable[[int], None]] = []
        self.records: list[Callable[[int], None]] = []
        self.is_listening = False
        self._launcher = Launcher()
        self._interrupted_at: float | None = None
        self._old: dict[int, Any] = {}
        self._old_wakeup = -1
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "StopSignals":
        global _entered
        if threading.current_thread() is not threading.main_thread():
            assert _is_guest, "only the main thread may handle signals"
            return self
        self._bell, hears = socket.socketpair()  # the interpreter writes every signal's number to it, from any code
        self._bell.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=(hears,), name="sslrun-signals", daemon=True)
        self._thread.start()
        _entered = self
        for number in CODES:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._old[number] = signal.signal(number, self._interrupt if number == signal.SIGINT else self._preempt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _entered
        if self._thread is None:
            return
        _entered = None
        self.has_nothing_to_save = False
        for number, handler in self._old.items():
            handler = early_signals.after_run(number, handler)
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._bell.close()
        self._thread.join()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it `stop_if_asked` looks: around work between two steps that may be left in the middle."""
        self.is_listening = True
        try:
            yield
        finally:
            self.is_listening = False

    def _preempt(self, number: int, frame: FrameType | None) -> None:
        self._hear(PREEMPTED)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            self._hear(INTERRUPTED)
        elif now - self._interrupted_at > DEBOUNCE_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt

    def _hear(self, code: int) -> None:
        self.exit_code = self.exit_code or code
        if self.has_nothing_to_save and self.raises:
            self.raises = False
            raise Stopped(self.exit_code)

    def _watch(self, hears: socket.socket) -> None:
        """The thread's work, until the other end is closed."""
        asked_at: float | None = None
        interrupted: list[float] = []  # when; a Ctrl-C that arrives twice counts once
        is_recorded = False
        with hears:
            while True:
                left_s = _LOOK_S if asked_at is None else asked_at + GRACE_S - time.monotonic()
                hears.settimeout(left_s if 0 < left_s < _LOOK_S else _LOOK_S)
                numbers = b""
                with contextlib.suppress(TimeoutError):
                    numbers = hears.recv(64)
                    if not numbers:
                        return
                for number in numbers:
                    self.exit_code = self.exit_code or CODES.get(number, 0)
                    now = time.monotonic()
                    if number == signal.SIGINT and (not interrupted or now - interrupted[-1] > DEBOUNCE_S):
                        interrupted.append(now)
                if len(interrupted) > 1 and time.monotonic() - interrupted[1] >= GRACE_S and not is_recorded:
                    is_recorded = True
                    threading.Thread(target=self._say, args=(self.records, INTERRUPTED), daemon=True).start()
                if not self.exit_code and self._launcher.is_gone():
                    logger.warning("the launcher of this process has ended: saving and stopping")
                    self.exit_code = PREEMPTED
                if self.exit_code and asked_at is None:
                    asked_at = time.monotonic()
                is_late = asked_at is not None and time.monotonic() - asked_at >= GRACE_S
                if is_late and self.has_nothing_to_save and not _is_guest:
                    self._end()

    def _end(self) -> None:
        """Ends the process, whatever the main thread does."""
        words = [*self.last_words, *self.records]
        speaker = threading.Thread(target=self._say, args=(words, self.exit_code), daemon=True)
        speaker.start()
        speaker.join(LAST_WORDS_S)
        os._exit(self.exit_code)

    @staticmethod
    def _say(words: Sequence[Callable[[int], None]], code: int) -> None:
        for say in words:
            try:
                say(code)
            except Exception as error:
                logger.warning("%s", error)
        sys.stdout.flush()
        sys.stderr.flush()


_entered: StopSignals | None = None
_is_guest = False


@contextlib.contextmanager
def as_guest() -> Iterator[None]:
    """Within it sslrun is a guest in a program: signals end the process only by an exception, and a run in another
    thread than the main one leaves them to the program."""
    global _is_guest
    before, _is_guest = _is_guest, True
    try:
        yield
    finally:
        _is_guest = before


def _forked() -> None:
    """In a forked child: what it hears is not for its parent."""
    if _entered is not None:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forked)


def requested() -> int:
    """The exit code that this process was asked to leave with; 0 if no signal has come, or no run is under way.

    For waits that are deep inside a run. Any thread may ask.
    """
    return 0 if _entered is None else _entered.exit_code


def is_listening() -> bool:
    """Whether a run is in `StopSignals.listening`."""
    return _entered is not None and _entered.is_listening


def end_by_verdict() -> None:
    """No signal ends this process from now on: its heartbeat will, with the name of the rank that is missing."""
    if _entered is not None:
        _entered.has_nothing_to_save = False


def record_by(record: Callable[[int], None]) -> None:
    """Adds to the `records` of the run that is under way, if there is one."""
    if _entered is not None:
        _entered.records.append(record)
