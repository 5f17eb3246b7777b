"""Reads encoded images with threads of its own, ahead of the decoder, so that a slow disk has many reads in flight.

As long as reads are quick (files in the disk's cache), one thread reads all batches. More of them would only compete
with the decoder: for Python's lock at each system call, and with fresh memory in each thread.
"""

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sslrun.data.sources import Source

_LEAST_THREADS = 8
_PART_S = 0.01  # seconds of reading that are worth one more thread


@dataclass(frozen=True)
class Unreadable:
    """A sample that cannot be read.

    Attributes:
        reason: in a few words.
    """

    reason: str


Read = np.ndarray | Unreadable
"""An encoded image as a one-dimensional uint8 array, or why there is none."""


class Readers:
    """Threads that call `Source.encoded`.

    Args:
        source: opened; of encoded images.
        num_threads: number of threads of a loader's other work; as many read, or 8 if that is more, where reads take
            long, since waiting for a disk costs no processor time.
    """

    def __init__(self, source: Source, num_threads: int) -> None:
        self.source, self.num_threads = source, max(num_threads, _LEAST_THREADS)
        self._one = ThreadPoolExecutor(1, "sslrun-read")
        self._many = ThreadPoolExecutor(self.num_threads, "sslrun-read")
        self._sample_s = 1.0  # how long a read takes: slow, until it is known

    def start(self, ids: np.ndarray) -> "Reading":
        """Begin to read some samples, in as many threads as the time for them is worth."""
        wanted = max(1, math.ceil(len(ids) * self._sample_s / _PART_S))
        parts = np.array_split(ids, min(wanted, self.num_threads, len(ids)))
        pool = self._one if len(parts) == 1 else self._many
        return Reading([pool.submit(self._read, part) for part in parts])

    def close(self) -> None:
        """Wait for the reads that are under way and drop the others."""
        for pool in (self._one, self._many):
            pool.shutdown(cancel_futures=True)

    def _read(self, ids: np.ndarray) -> list["Read"]:
        start = time.perf_counter()
        result = read_all(self.source, ids)
        # At once up, gradually down: it is reads that wait for the disk that need threads.
        self._sample_s = max((time.perf_counter() - start) / len(ids), self._sample_s / 2)
        return result


@dataclass(frozen=True)
class Reading:
    """Samples that are being read."""

    parts: Sequence[Future[list[Read]]]

    def result(self) -> list[Read]:
        """The encoded images in the order of the ids; waits for them."""
        return [read for part in self.parts for read in part.result()]


def read_all(source: Source, ids: np.ndarray) -> list[Read]:
    """Encoded images of some samples; if one cannot be read, all are read one by one to find out which."""
    try:
        return [_checked(np.frombuffer(content, dtype=np.uint8)) for content in source.encoded(ids)]
    except (OSError, ValueError) as error:
        if len(ids) > 1:
            return [read for sample in ids for read in read_all(source, np.array([sample]))]
        return [Unreadable(reason_of(error))]


def reason_of(error: OSError | ValueError) -> str:
    """What an error of `Source.encoded` says, in a few words."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text[:1].lower() + text[1:]


def _checked(content: np.ndarray) -> Read:
    return content if len(content) else Unreadable("the file is empty")
