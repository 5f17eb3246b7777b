"""Signals that come before a run has begun, while its libraries are imported and its recipe is read.

The process then ends with one line and the exit code that the same signal gives later (`signals.py`). What comes before
`enter` cannot be answered: the interpreter's own start, and the imports of the programs that call it. Imports nothing
that takes time, and runs on any Python 3.
"""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import Any

PREEMPTED, INTERRUPTED = 75, 130
CODES: "dict[int, int]" = {
    signal.SIGINT: INTERRUPTED,
    signal.SIGTERM: PREEMPTED,
    signal.SIGUSR1: PREEMPTED,
    signal.SIGHUP: PREEMPTED,
}
HELD = (*CODES, signal.SIGTSTP, signal.SIGCHLD)
"""The signals that a rank of `starter.py` begins without, so that none ends it before it can answer."""

_old: "dict[int, Any]" = {}  # the handlers before `enter`, by signal


def enter() -> None:
    """Answer signals from here on, and those that were held up. Those that are ignored (`nohup`) or that have a handler
    already are left alone."""
    for number in CODES:
        handler = signal.getsignal(number)
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            _old[number] = signal.signal(number, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


def leave() -> None:
    """Give the signals their old handlers back, unless somebody else has taken them."""
    for number, handler in _old.items():
        if signal.getsignal(number) is _leave:
            signal.signal(number, handler)


def after_run(number: int, handler: Any) -> Any:
    """The handler that a signal gets when a run has ended, in the place of `handler`, the one before the run.

    If `enter` has set that one, the process only has to leave, with the code of its run. What comes meanwhile must not
    change the code: torchrun sends SIGTERM to all ranks as soon as one has failed. Ctrl-C still interrupts.
    """
    if handler is not _leave:
        return handler
    return _old[number] if number == signal.SIGINT else signal.SIG_IGN


def _leave(number: int, frame: "FrameType | None") -> None:
    """Ends the process at once: an exception could end in a library that is being imported, and catches everything."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or in the middle of a write
            stream.flush()
    if os.environ.get("LOCAL_RANK", "0") == "0":  # every rank is asked: one per machine answers
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):
            os.write(2, f"error: {name} came before the run began: nothing to save\n".encode())
    os._exit(CODES[signal.Signals(number)])
