"""What stops a run: signals, and the end of its launcher.

The loop reads the exit code after each step, saves, and exits with it.
"""

import logging
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from sslrun.runtime import early_signals
from sslrun.runtime.launcher import Launcher

logger = logging.getLogger(__name__)

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
    """While it is entered, SIGTERM, SIGUSR1 and SIGHUP (exit code 75) and SIGINT (130) only set `exit_code`.

    The first signal decides the code. A second Ctrl-C raises KeyboardInterrupt, to leave without saving, and a third
    kills the process at once. A SIGHUP that is ignored on entering (`nohup`) stays ignored. The old handlers come back
    on leaving.
    """

    def __init__(self) -> None:
        self._exit_code = 0
        self._launcher = Launcher()
        self._interrupted_at: float | None = None
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        global _entered
        assert threading.current_thread() is threading.main_thread(), "only the main thread may handle signals"
        for number, handler in (
            (signal.SIGTERM, self._preempt),
            (signal.SIGUSR1, self._preempt),
            (signal.SIGHUP, self._preempt),
            (signal.SIGINT, self._interrupt),
        ):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._old[number] = signal.signal(number, handler)
        _entered = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _entered
        _entered = None
        for number, handler in self._old.items():
            handler = early_signals.before(number, handler)
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def exit_code(self) -> int:
        """Exit code of the process after saving; 0 as long as no signal has come and the launcher lives."""
        if not self._exit_code and self._launcher.is_gone():
            logger.warning("the launcher of this process has ended: saving and stopping")
            self._exit_code = PREEMPTED
        return self._exit_code

    def _preempt(self, number: int, frame: FrameType | None) -> None:
        self._exit_code = self._exit_code or PREEMPTED

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            self._exit_code = self._exit_code or INTERRUPTED
        elif now - self._interrupted_at > DEBOUNCE_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt


_entered: StopSignals | None = None


def requested() -> int:
    """The exit code that this process was asked to leave with; 0 if no signal has come, or no run is under way.

    For waits that are deep inside a run. Any thread may ask.
    """
    return 0 if _entered is None else _entered.exit_code
