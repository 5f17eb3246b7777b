"""Image sizes, read once per source and kept on disk.

Random crops are drawn before an image is decoded, so sizes must be known: Pillow reads them from the headers.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import logging
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from sslrun.data import waiting
from sslrun.data.outage import Patience, Record, Unreadable, is_outage, unreadable

if TYPE_CHECKING:
    from sslrun.data.sources.base import Source

logger = logging.getLogger("sslrun")

T = TypeVar("T")

_CHUNK = 512
_FIRST = 64  # files in the first chunk, which shows how quick the storage is
_QUICK_S = 1e-4  # that a thread waits for a file, below which more threads only compete for Python's lock
THREADS = 16
_VERSION = b"2"
NOT_KNOWN = -1  # in the cache: a size that could not be read, by the storage's fault


def cache_dir() -> Path:
    """Folder of indexes and compiled code: `$SSLRUN_CACHE`, otherwise `sslrun` in the user's cache folder."""
    own = os.environ.get("SSLRUN_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sslrun"


def say_not_kept(error: OSError) -> None:
    """Tell, once, that the cache folder cannot be written."""
    _say_once(f"the index of images is not kept, so that the next start takes as long: {error}", str(cache_dir()))


@functools.cache
def _say_once(text: str, folder: str) -> None:
    logger.info("%s", text)


def read_sizes(source: Source) -> np.ndarray:
    """Sizes of a source's N images, from the cache if the source's fingerprint is the same as then.

    While the storage gives errors, they are waited for. What still cannot be read is not known: 0, 0 in the result, and
    read again by whoever asks next.

    Returns:
        (N, 2) int32, height and width as stored (EXIF rotation not applied); 0, 0 for an unreadable header.

    Raises:
        RunFailed: no image can be read.
        Stopped: the run is asked to stop.
    """
    start = time.monotonic()
    threads, wait = waiting.Threads(THREADS, "sslrun-index"), waiting.Wait()
    try:
        prints = list(in_parts(threads, source.fingerprint, np.arange(len(source)), wait))
        cache = _cache_file([one for one in prints if one is not None]) if None not in prints else None
        kept = None if cache is None else _load(cache, len(source))
        sizes = np.full((len(source), 2), NOT_KNOWN, np.int32) if kept is None else kept.copy()
        read_missing(source, sizes, threads, wait, is_again=kept is not None)
    finally:
        threads.close()
    if cache is not None and (kept is None or (sizes != kept).any()):
        _save(cache, sizes)
    elapsed_s = time.monotonic() - start
    if elapsed_s > 5:
        logger.info("sizes of %d images read in %.0f s", len(source), elapsed_s)
    return np.maximum(sizes, 0)


def read_missing(
    source: Source, sizes: np.ndarray, threads: waiting.Threads, wait: waiting.Wait, is_again: bool
) -> None:
    """Enter the sizes that are not known, with a bar on a terminal. Those that cannot be read stay so, by the storage's
    fault.

    Args:
        source: opened.
        sizes: (N, 2), changed.
        threads: what reads.
        wait: what waits for them.
        is_again: whether they could not be read the last time either; then single files are not waited for.
    """

    from sslrun.runtime.bar import WholeLine

    def read(ids: np.ndarray) -> list[tuple[int, int] | Unreadable]:
        parts = [threads.submit(_sizes, source, part) for part in np.array_split(ids, min(len(ids), THREADS))]
        return [size for part in parts for size in waiting.result(part, wait)]

    missing = np.flatnonzero(sizes[:, 0] == NOT_KNOWN)
    patience = Patience(read, source.names, wait, Record())
    known = missing.tolist() if is_again else ()
    unknown, reason = 0, ""
    bar = WholeLine(None, "reading image sizes", len(missing), leave=False, dynamic_ncols=True, disable=None, delay=1)
    for ids, found in in_parts(threads, lambda ids: (ids, _sizes(source, ids)), missing, wait):
        bar.update(len(ids))
        for sample, size in zip(ids.tolist(), patience.settle(ids, found, known), strict=True):
            if isinstance(size, Unreadable):
                unknown, reason = unknown + 1, reason or f"{source.names[sample]}: {size.reason}"
            else:
                sizes[sample] = size
    bar.close()
    if unknown:
        logger.warning("the sizes of %d images are not known, which cannot be read for now; %s", unknown, reason)


def in_parts(
    threads: waiting.Threads, function: Callable[[np.ndarray], T], ids: np.ndarray, wait: waiting.Wait
) -> Iterator[T]:
    """Results of a function that reads files, for the ids in chunks, in order, some chunks ahead. One thread calls it
    as long as the files come at once, and `threads` do from the first chunk on whose files are waited for."""

    def timed(part: np.ndarray) -> tuple[T, float]:
        start, start_cpu = time.perf_counter(), time.thread_time()
        result = function(part)
        waited_s = time.perf_counter() - start - (time.thread_time() - start_cpu)
        return result, waited_s / len(part)

    bounds = [0, *range(_FIRST, len(ids), _CHUNK), len(ids)]
    parts = (ids[start:end] for start, end in itertools.pairwise(bounds) if start < end)
    one = waiting.Threads(1, "sslrun-index")
    chosen, most_ahead = one, 2
    ahead: deque[Future[tuple[T, float]]] = deque()
    try:
        while True:
            ahead.extend(chosen.submit(timed, part) for part in itertools.islice(parts, most_ahead - len(ahead)))
            if not ahead:
                return
            wait.begin()
            wait()  # also where each part comes at once
            result, waited_s = waiting.result(ahead.popleft(), wait)
            wait.end()
            if chosen is one and waited_s > _QUICK_S:
                chosen, most_ahead = threads, 2 * THREADS
            yield result
    finally:
        one.close()


def looked_at(function: Callable[[np.ndarray], T], ids: np.ndarray, wait: waiting.Wait) -> Iterator[T]:
    """As `in_parts`, with threads of its own."""
    threads = waiting.Threads(THREADS, "sslrun-index")
    try:
        yield from in_parts(threads, function, ids, wait)
    finally:
        threads.close()


def _cache_file(prints: Sequence[bytes]) -> Path:
    digest = hashlib.blake2b(_VERSION, digest_size=16)
    for one in prints:
        digest.update(one)
    return cache_dir() / "index" / f"{digest.hexdigest()}.npy"


def _sizes(source: Source, ids: np.ndarray) -> list[tuple[int, int] | Unreadable]:
    """Sizes of some images; those after the first that the storage fails for are not tried."""
    if source.is_decoded:
        import torch

        waiting.note(source.names[int(ids[0])])
        images = source.decoded(ids, torch.device("cpu"))
        return [(int(image.shape[0]), int(image.shape[1])) for image in images]
    found: list[tuple[int, int] | Unreadable] = []
    for sample in ids.tolist():
        found.append(size_of(source, sample))
        if is_outage(found[-1]):
            return found + found[-1:] * (len(ids) - len(found))
    return found


def size_of(source: Source, sample: int) -> tuple[int, int] | Unreadable:
    """Height and width of an image: 0, 0 if it has none that can be read, an outage if the storage is at fault."""
    waiting.note(source.names[sample])
    try:
        with source.open_encoded(sample) as file:
            return source.size_in_header(file)
    except OSError as error:
        trouble = unreadable(error, source.files_root)
        return trouble if trouble.is_outage else (0, 0)
    except Exception:  # Pillow's plugins raise whatever a damaged header leads them to
        return 0, 0


def size_in(encoded: np.ndarray) -> tuple[int, int] | None:
    """Height and width of an encoded image, (n,) uint8; None if its header has none."""
    try:
        size = header(io.BytesIO(encoded.data))
    except Exception:  # Pillow's plugins raise whatever a damaged header leads them to
        return None
    return size if min(size) > 0 else None


def header(file: IO[bytes]) -> tuple[int, int]:
    """Height and width in the header of an open image file. Raises what Pillow raises if they cannot be read."""
    with Image.open(file) as image:
        return image.height, image.width


def _load(cache: Path, count: int) -> np.ndarray | None:
    try:
        sizes: np.ndarray = np.load(cache)
    except (OSError, ValueError, EOFError):
        return None
    return sizes if sizes.shape == (count, 2) else None


def _save(cache: Path, sizes: np.ndarray) -> None:
    """Written to a temporary file and renamed. A cache that cannot be written only costs time at the next start."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache.parent, suffix=".tmp", delete=False) as file:
            np.save(file, sizes)
        os.replace(file.name, cache)
    except OSError as error:
        say_not_kept(error)
