"""Reads encoded images with threads of its own, ahead of the decoder, so that a slow disk has many reads in flight.

As long as reads are quick (files in the disk's cache), one thread reads all batches. More of them would only compete
with the decoder: for Python's lock at each system call, and with fresh memory in each thread.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from sslrun.data import waiting
from sslrun.data.outage import Unreadable, is_outage, unreadable
from sslrun.data.sources import Source

_LEAST_THREADS = 8
_PART_S = 0.01  # seconds of reading that are worth one more thread


Read = np.ndarray | Unreadable
"""An encoded image as a one-dimensional uint8 array, the pixels of one with bands, or why there is none."""


class Readers:
    """Threads that call `Source.encoded`.

    Args:
        source: opened; of encoded images.
        num_threads: number of threads of a loader's other work; as many read, or 8 if that is more, where reads take
            long, since waiting for a disk costs no processor time.
    """

    def __init__(self, source: Source, num_threads: int) -> None:
        self.source, self.num_threads = source, max(num_threads, _LEAST_THREADS)
        self._one = waiting.Threads(1, "sslrun-read")
        self._many = waiting.Threads(self.num_threads, "sslrun-read")
        self._sample_s = 1.0  # how long a read takes: slow, until it is known

    def start(self, ids: np.ndarray) -> "Reading":
        """Begin to read some samples, in as many threads as the time for them is worth."""
        wanted = max(1, math.ceil(len(ids) * self._sample_s / _PART_S))
        parts = np.array_split(ids, min(wanted, self.num_threads, len(ids)))
        pool = self._one if len(parts) == 1 else self._many
        return Reading([pool.submit(self._read, part) for part in parts])

    def close(self) -> None:
        """Drop the reads that have not begun; those under way are waited for, but not for long."""
        for threads in (self._one, self._many):
            threads.close()

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

    def result(self, go_on: Callable[[], None]) -> list[Read]:
        """The encoded images in the order of the ids; waits for them.

        Args:
            go_on: called every now and then while they do not come; it may raise to end the wait.
        """
        return [read for part in self.parts for read in waiting.result(part, go_on)]


def read_all(source: Source, ids: np.ndarray) -> list[Read]:
    """Encoded images of some samples; if one cannot be read, all are read one by one to find out which. Those after the
    first that the storage fails for are not tried, since each attempt may take minutes."""
    waiting.note(source.names[int(ids[0])])
    try:
        contents: Any = source.encoded(ids)
        return (
            list(contents) if source.has_bands else [_checked(np.frombuffer(one, dtype=np.uint8)) for one in contents]
        )
    except (OSError, ValueError) as error:
        if len(ids) == 1:
            return [unreadable(error, _folder(source, int(ids[0]), error))]
    finally:
        waiting.done()
    reads: list[Read] = []
    for sample in ids:
        reads += read_all(source, np.array([sample]))
        if is_outage(reads[-1]):
            return reads + reads[-1:] * (len(ids) - len(reads))
    return reads


def _folder(source: Source, sample: int, error: OSError | ValueError) -> str | None:
    """The folder that a sample's file must be in: its own, if it has been there when the sizes were read."""
    was_there = source.has_size(sample)
    path = error.filename if isinstance(error, OSError) else None
    return os.path.dirname(path) if was_there and isinstance(path, str) else source.files_root


def _checked(content: np.ndarray) -> Read:
    return content if len(content) else Unreadable("the file is empty")
