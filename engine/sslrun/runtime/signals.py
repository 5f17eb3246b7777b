"""Signals that stop a run: handlers set an exit code; the loop reads it after each step, saves, and exits with it."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

PREEMPTED, INTERRUPTED = 75, 130
DEBOUNCE_S = 1.0  # one Ctrl-C may arrive twice: from the terminal and from the launcher that passes it on


class Stopped(Exception):
    """The run received a signal to stop, and its work is saved.

    Attributes:
        exit_code: exit code of the process.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class StopSignals:
    """While it is entered, SIGTERM and SIGUSR1 (exit code 75) and SIGINT (130) only set `exit_code`.

    The first signal decides the code. A second Ctrl-C raises KeyboardInterrupt, to leave without saving, and a third
    kills the process at once. The old handlers come back on leaving.

    Attributes:
        exit_code: exit code of the process after saving; 0 as long as no signal has come.
    """

    exit_code: int

    def __init__(self) -> None:
        self.exit_code = 0
        self._interrupted_at: float | None = None
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        assert threading.current_thread() is threading.main_thread(), "only the main thread may handle signals"
        for number, handler in (
            (signal.SIGTERM, self._preempt),
            (signal.SIGUSR1, self._preempt),
            (signal.SIGINT, self._interrupt),
        ):
            self._old[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _preempt(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = self.exit_code or PREEMPTED

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            self.exit_code = self.exit_code or INTERRUPTED
        elif now - self._interrupted_at > DEBOUNCE_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
