"""Storage that gives errors: what an error says about an image, and how long a batch waits for the storage.

A storage error says nothing about the image. All images of a batch that cannot be read wait together, with growing
pauses, for `durable.RETRY_S`. After that the run ends if no image at all can be read. If others can be read, only these
files are at fault (a permission, one server of many), and they are replaced for now. That is waited for once in
`AGAIN_S`, so that many such files do not cost a minute each.
"""

import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from sslrun.data import waiting
from sslrun.errors import RunFailed
from sslrun.runtime import durable

logger = logging.getLogger("sslrun")

T = TypeVar("T")

AGAIN_S = 3600.0  # after which single files are waited for again
_MOST_PAUSE_S = 8.0
_PROBES = 8  # other images that are tried, to see whether anything can be read


@dataclass(frozen=True)
class Unreadable:
    """A sample that cannot be read.

    Attributes:
        reason: in a few words.
        is_outage: whether the storage is at fault, so that nothing is known about the sample.
    """

    reason: str
    is_outage: bool = False


def unreadable(error: OSError | ValueError, folder: str | None) -> Unreadable:
    """What an error of reading a sample says.

    Args:
        error: of the source.
        folder: where the sample's file must be. If it is gone too, its disk may not be mounted, and nothing is known
            about the file. None or empty: there is no such folder.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    is_outage = isinstance(error, OSError) and durable.is_outage(error)
    if folder and isinstance(error, (FileNotFoundError, NotADirectoryError)):
        is_outage = _is_gone(folder)
    return Unreadable(text[:1].lower() + text[1:], is_outage)


def is_outage(read: object) -> bool:
    """Whether a result is an `Unreadable` that the storage is to blame for."""
    return isinstance(read, Unreadable) and read.is_outage


def _is_gone(folder: str) -> bool:
    """Whether a folder is missing, empty (an unmounted disk leaves an empty one) or cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


@dataclass
class Record:
    """What a loader remembers of single files that could not be read.

    Attributes:
        waited_at: when they were last waited for in vain, on the monotonic clock.
    """

    waited_at: float = -float("inf")


class Patience(Generic[T]):
    """Waits for storage that gives errors.

    Args:
        read: reads some samples, (n,) int64 ids; of a part of them that one thread reads, it may stop at the first
            outage.
        names: what each sample is called.
        go_on: called every now and then while nothing comes; it may raise to end the wait.
        record: is kept from one object to the next.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], Sequence[T | Unreadable]],
        names: Sequence[str],
        go_on: Callable[[], None],
        record: Record,
    ) -> None:
        self._read, self._names, self._go_on, self._record = read, names, go_on, record
        self._place = 0  # of the next sample that is tried to see whether anything can be read

    def settle(
        self, ids: np.ndarray, reads: Sequence[T | Unreadable], known: Collection[int] = ()
    ) -> list[T | Unreadable]:
        """Results of reading some samples, read again as long as the storage gives errors.

        Args:
            ids: (n,) int64.
            reads: n results of `read`.
            known: samples that have been waited for before, in vain.

        Returns:
            n results; those that are still outages belong to single files, while others can be read.

        Raises:
            RunFailed: no image can be read, for `durable.RETRY_S`.
            Whatever `go_on` raises.
        """
        settled = list(reads)
        rows = [row for row, read in enumerate(settled) if is_outage(read)]
        begin, pause_s = time.monotonic(), durable.FIRST_PAUSE_S
        for attempt in itertools.count():
            for row, read in zip(rows, self._read(ids[rows]) if rows else (), strict=True):
                settled[row] = read
            rows = [row for row in rows if is_outage(settled[row])]
            waited_s = time.monotonic() - begin
            if not rows:
                if attempt > 0:
                    logger.warning("the storage can be read again, after %.1f s; nothing was replaced", waited_s)
                return settled
            read = settled[rows[0]]
            assert isinstance(read, Unreadable)
            name, is_over = self._names[int(ids[rows[0]])], waited_s >= durable.RETRY_S
            is_new = not set(ids[rows].tolist()) <= set(known)
            is_worth_it = is_new and begin - self._record.waited_at >= AGAIN_S
            if (is_over or not is_worth_it) and self._others_can_be_read(ids[rows]):
                for row in rows:  # each alone: the first may have kept the others from being tried
                    (settled[row],) = self._read(ids[row : row + 1])
                if is_over:
                    self._record.waited_at = time.monotonic()
                return settled
            if is_over:
                raise RunFailed(f"{name}: {read.reason}: no image can be read (tried for {waited_s:.0f} s)")
            if attempt == 0:
                text = "storage error: %s: %s; tried again for up to %.0f s; images that wait: %d"
                logger.warning(text, name, read.reason, durable.RETRY_S, len(rows))
            self._pause(min(pause_s, durable.RETRY_S - waited_s), name)
            pause_s = min(2 * pause_s, _MOST_PAUSE_S)
        raise AssertionError("counting does not end")

    def _others_can_be_read(self, ids: np.ndarray) -> bool:
        """Whether the storage answers for any of a few other samples, new ones at each call: those that were read
        before may still be in memory."""
        count = len(self._names)
        step = next(step for step in itertools.count(count // _PROBES + 1) if math.gcd(step, count) == 1)
        others: list[int] = []
        for _ in range(min(count, 100 * _PROBES)):  # each sample once at most
            self._place = (self._place + step) % count
            if self._place not in ids:
                others.append(self._place)
            if len(others) == _PROBES:
                break
        return any(not is_outage(self._read(np.array([sample]))[0]) for sample in others)

    def _pause(self, pause_s: float, name: str) -> None:
        deadline = time.monotonic() + pause_s
        with waiting.doing(name, "cannot be read and is tried again"):
            while (left_s := deadline - time.monotonic()) > 0:
                self._go_on()
                time.sleep(min(waiting.STEP_S, left_s))
