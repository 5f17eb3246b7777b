"""Waiting for data that may not come: storage hangs, and a thread in a system call cannot be ended.

What touches the storage of samples is done by threads that nobody has to wait for, and its results are waited for in
short steps. So a wait can say what it waits for, and a run can be stopped meanwhile.
"""

import concurrent.futures
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from sslrun.runtime import signals

logger = logging.getLogger("sslrun")

T = TypeVar("T")

NOTICE_S = 30.0  # after which a wait says what it waits for
STEP_S = 0.2  # between two looks at whether to go on waiting
_CLOSE_S = 1.0  # for threads that are in the middle of a read, which as a rule is short

_doings: dict[int, tuple[float, str, str]] = {}  # of each thread: since when, what, what is done with it


def note(what: str, doing: str = "is being read") -> None:
    """Say what this thread does from now on, which may take long: a path, and what happens to it."""
    _doings[threading.get_ident()] = time.monotonic(), what, doing


def done() -> None:
    """This thread does nothing any more that may take long."""
    _doings.pop(threading.get_ident(), None)


@contextlib.contextmanager
def doing(what: str, doing: str = "is being read") -> Iterator[None]:
    """A `note` for as long as the block takes."""
    note(what, doing)
    try:
        yield
    finally:
        done()


def since(thread: int | None) -> float | None:
    """When a thread began what it does, on the monotonic clock; None if it has noted nothing."""
    doing = _doings.get(thread or 0)
    return None if doing is None else doing[0]


def oldest() -> str:
    """What has been under way for the longest time, in a few words."""
    begun = min(list(_doings.values()), default=None)
    return "images are being decoded" if begun is None else f"{begun[1]} {begun[2]}"


class Wait:
    """Waits for data, one after the other: it is called again and again while nothing comes.

    Args:
        patience_s: seconds after which a run that is asked to stop is not kept waiting.
    """

    def __init__(self, patience_s: float = 0.0) -> None:
        self._patience_s = patience_s
        self.begin()

    def begin(self) -> None:
        """A new wait begins."""
        self._since, self._is_told = time.monotonic(), False

    def __call__(self) -> None:
        """Go on waiting; after `NOTICE_S`, once in each wait, one line of the log says what for.

        Raises:
            Stopped: the run is asked to stop.
        """
        waited_s = time.monotonic() - self._since
        if waited_s >= self._patience_s and (code := signals.requested()):
            raise signals.Stopped(code)
        if waited_s >= NOTICE_S and not self._is_told:
            self._is_told = True
            logger.warning("waiting for data for %.0f s: %s", waited_s, oldest())

    def end(self) -> None:
        """The data is there, which is said if the wait was long; the next wait begins."""
        if self._is_told:
            logger.warning("data comes again, after %.0f s", time.monotonic() - self._since)
        self.begin()


def result(future: Future[T], go_on: Callable[[], None]) -> T:
    """A future's result; `go_on` is called every `STEP_S` until it is there, and may raise to end the wait."""
    while True:
        try:
            return future.result(STEP_S)
        except concurrent.futures.TimeoutError:
            if future.done():  # otherwise it may be the work's own error
                return future.result()
        go_on()


def patiently(function: Callable[[], T]) -> T:
    """What a function returns or raises that reads from storage. It is called in another thread, which is left alone
    if the run is asked to stop (Stopped) or Ctrl-C comes."""
    threads, wait = Threads(1, "sslrun-open"), Wait()
    try:
        value = result(threads.submit(function), wait)
        wait.end()
        return value
    finally:
        threads.close()


class Threads:
    """Threads that do what they are given, in order. Neither `close` nor the end of the process waits for one that does
    not come back; those of `concurrent.futures` are waited for at the end of the process.

    Args:
        most: number of threads at most; one more is started whenever all have work.
        name: of each of them.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name = most, name
        self._work: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._started: list[threading.Thread] = []

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Have a function called by one of the threads; the future's result is what it returns or raises."""
        future: Future[T] = Future()
        self._work.put((future, function, arguments))
        if not self._idle.acquire(blocking=False) and len(self._started) < self._most:
            thread = threading.Thread(target=_serve, args=(self._work, self._idle), name=self._name, daemon=True)
            self._started.append(thread)
            thread.start()
        return future

    def close(self) -> None:
        """Drop what has not begun and end the threads; one that is stuck ends when it comes back."""
        while True:
            try:
                future, *_ = self._work.get_nowait()
                future.cancel()
            except queue.Empty:
                break
        for _ in self._started:
            self._work.put(None)
        deadline = time.monotonic() + _CLOSE_S
        for thread in self._started:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._started.clear()


def _serve(work: "queue.SimpleQueue[Any]", idle: threading.Semaphore) -> None:
    while (item := work.get()) is not None:
        future, function, arguments = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
        done()
        del item, future, function, arguments  # nothing is kept alive while the thread waits
        idle.release()
