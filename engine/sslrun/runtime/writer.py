"""Writes checkpoints while training goes on: a thread, with one piece of work at a time."""

import logging
import threading
from collections.abc import Callable
from types import TracebackType

from sslrun.runtime import heartbeat

logger = logging.getLogger(__name__)


class Writer:
    """Does work in a thread. One process of a run, rank 0, has work for it; in the others every call does nothing.

    An error of the work is raised in the main thread, by the next call of `check` or `wait`.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begins a piece of work; the one before must have been waited for. If a rank is lost meanwhile, this process
        ends after the work."""
        assert self._thread is None, "one piece of work at a time"
        self._thread = threading.Thread(target=self._do, args=(work,), name="sslrun-writer", daemon=True)
        self._thread.start()
        heartbeat.ends_after(self._thread)

    def check(self) -> None:
        """Raises the error of work that has failed; does not wait."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Waits until the work is done, and raises its error if it has failed."""
        self._join()
        self.check()

    def leave(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Ends with a run, also with one that fails: the work is finished, but not after a second Ctrl-C. If it fails
        too, that is only a warning."""
        if self._thread is None or isinstance(error, KeyboardInterrupt):
            return
        heartbeat.stop_judging()  # the others have perhaps failed alike, and left already
        self._join()
        if self._error is not None:
            logger.warning("%s", self._error)

    def _join(self) -> None:
        if self._thread is not None:
            with heartbeat.uninterrupted():
                self._thread.join()
            self._thread = None

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
