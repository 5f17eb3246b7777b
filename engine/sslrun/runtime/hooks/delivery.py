"""Calls a log hook in a thread of its own, so that no server, disk or library holds up the run."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sslrun.errors import RunFailed, UsageError
from sslrun.runtime.hooks.base import Hook

logger = logging.getLogger(__name__)

WAITING_CALLS = 1000  # rows that a hook may be behind
OPEN_S = 300.0  # for a server, or the tables of a new data base on slow storage
CLOSE_S = 30.0  # for the last rows
MOST_CHARACTERS = 500  # of an error
ABORT_S = 2.0  # for the thread to end after `Hook.abort`


class Delivery:
    """One hook of a run. `open` it first, and `close` all hooks last.

    Args:
        hook: the hook, not opened yet.
    """

    def __init__(self, hook: Hook) -> None:
        self.hook = hook
        self._name = type(hook).__name__
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._is_open = threading.Event()
        self._error: BaseException | None = None
        self._has_ended = self._is_aborted = self._is_behind = False
        self._thread = threading.Thread(target=self._work, name=f"sslrun-{self._name}", daemon=True)

    def open(self, folder: Path, name: str, values: dict[str, Any], first_step: int) -> None:
        """Opens the hook and waits for that. Arguments as of `Hook.open`.

        Raises:
            UsageError: the hook cannot be used here.
            RunFailed: something else is wrong, and the run is new.
        """
        self._calls.put(lambda: self.hook.open(folder, name, values, first_step))
        self._calls.put(self._catch_up)
        self._thread.start()
        try:
            is_open = self._is_open.wait(OPEN_S)
        except BaseException:  # a signal
            self._abort()
            raise
        if not is_open:
            self._abort()
        error = self._error if is_open else TimeoutError(f"nothing has come for {OPEN_S:.0f} s")
        if isinstance(error, UsageError):
            raise error
        if error is not None and first_step == 0:
            raise RunFailed(f"log.hooks: {self._name} cannot be opened: {_in_words(error)}") from error
        if error is not None:
            logger.warning("log.hooks: %s cannot be opened and gets no rows: %s", self._name, _in_words(error))

    def call(self, work: Callable[[Hook], None]) -> None:
        """Leaves a call of the hook to its thread."""
        if self._has_ended:
            return
        if self._calls.qsize() < WAITING_CALLS:
            self._calls.put(lambda: work(self.hook))
        elif not self._is_behind:
            self._is_behind = True
            logger.warning("log.hooks: %s is %d rows behind, and misses some", self._name, WAITING_CALLS)

    def end(self, exit_code: int) -> None:
        """Lets the hook close itself after the calls that it was left; `wait` waits for that.

        Args:
            exit_code: exit code of the run.
        """
        self._calls.put(lambda: self._end(exit_code))

    def wait(self, deadline: float) -> None:
        """Waits until the hook is closed, and aborts it if that is not in time.

        Args:
            deadline: until when, on the clock `time.monotonic`.
        """
        try:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        finally:
            if self._thread.is_alive():
                logger.warning("log.hooks: %s does not end, and may miss the last rows", self._name)
                self._abort()

    def _catch_up(self) -> None:
        missed, self.hook.missed = self.hook.missed, ()
        for row in missed:
            self.hook.write(row)

    def _end(self, exit_code: int) -> None:
        self._has_ended = True
        self.hook.exit_code = exit_code
        self.hook.close()

    def _abort(self) -> None:
        self._has_ended = self._is_aborted = True
        self.hook.abort()
        self._thread.join(ABORT_S)

    def _work(self) -> None:
        """The thread's work: the calls in order, of which the first opens the hook and the last closes it."""
        try:
            while not self._has_ended:
                self._calls.get()()
                self._is_open.set()
        except BaseException as error:  # SystemExit too: of a library that ends
            self._fail(error)
        self._is_open.set()

    def _fail(self, error: BaseException) -> None:
        logger.debug("log.hooks: %s", self._name, exc_info=error)
        if not self._is_open.is_set():  # `open` raises it
            self._error, self._has_ended = error, True
            return
        if not self._is_aborted:
            logger.warning("log.hooks: %s failed and gets no more rows: %s", self._name, _in_words(error))
        if not self._has_ended:
            self._has_ended = True
            with contextlib.suppress(BaseException):
                self.hook.close()


def close(deliveries: Sequence[Delivery], exit_code: int) -> None:
    """Lets all hooks take their last rows and the exit code of the run at the same time, within `CLOSE_S`."""
    for delivery in deliveries:
        delivery.end(exit_code)
    deadline = time.monotonic() + CLOSE_S
    for delivery in deliveries:
        delivery.wait(deadline)


def _in_words(error: BaseException) -> str:
    return " ".join(str(error).split())[:MOST_CHARACTERS] or type(error).__name__
