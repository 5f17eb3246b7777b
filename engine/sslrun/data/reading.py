"""Reads encoded images with threads of its own, ahead of the decoder, so that a slow disk has many reads in flight."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sslrun.data.sources import Source

_LEAST_THREADS = 8


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
        num_threads: number of threads of a loader's other work; there are at least 8 that read, since waiting for a
            disk costs no processor time.
    """

    def __init__(self, source: Source, num_threads: int) -> None:
        self.source, self.num_threads = source, max(num_threads, _LEAST_THREADS)
        self._pool = ThreadPoolExecutor(self.num_threads, "sslrun-read")

    def start(self, ids: np.ndarray) -> "Reading":
        """Begin to read some samples, a part of them in each thread."""
        parts = np.array_split(ids, min(self.num_threads, len(ids)))
        return Reading([self._pool.submit(read_all, self.source, part) for part in parts])

    def close(self) -> None:
        """Wait for the reads that are under way and drop the others."""
        self._pool.shutdown(cancel_futures=True)


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
