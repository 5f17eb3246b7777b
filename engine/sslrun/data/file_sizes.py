"""Image sizes of files whose list is kept, in a table beside the list that processes share.

Of the files that are known, some are looked at when a table is opened, and all of them for a run that is resumed or if
one of those has changed: length and time of a file must be those of when its size was read.
"""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sslrun.data import table, waiting
from sslrun.data.index import NOT_KNOWN, THREADS, looked_at, read_missing

if TYPE_CHECKING:
    from sslrun.data.sources.files import FileSource, Paths

logger = logging.getLogger("sslrun")

LOOKED_AT = 16_384
"""Files that are looked at, at least, when a table is opened: all of a smaller source."""

_RUN = 64  # of them that follow each other
_HASHED = 1 << 24  # rows at a time


def file_sizes(source: "FileSource", looks_at_all: bool) -> tuple[np.ndarray, str | None]:
    """Sizes of a source's N images, whose names are kept. Sets their lengths.

    Of the processes that need them at the same time, one reads them and the others wait.

    Args:
        source: opened.
        looks_at_all: whether to look at every file. Otherwise only some are looked at if there are many.

    Returns:
        (N, 2) int32, as `index.read_sizes`; the digest of names, lengths and sizes, None if it is not known.

    Raises:
        RunFailed: no image can be read.
        Stopped: the run is asked to stop.
    """
    asked, wait = time.time_ns(), waiting.Wait()
    assert source.names.kept is not None
    names, names_id = source.names.kept
    path = names.with_suffix(".sizes")
    kept = _load(path, names_id)
    if kept is not None and not looks_at_all and not _has_changed(source.names, kept, wait):
        return _given(source.names, _load(path, names_id) or kept)  # without the pages that were touched
    with table.locked(path, wait) as is_writable:
        kept = _load(path, names_id)
        if kept is not None and _looked_at(path) >= asked:  # by another process, since this one asked
            return _given(source.names, kept)
        made = _current(source, kept, wait)
        made.about["names"] = names_id
        if not is_writable:
            logger.info("the index of image sizes is not kept: %s cannot be written", path.parent)
            return _given(source.names, made)
        try:
            if made is not kept:
                table.write(path, made.columns, made.about)
            os.utime(path, ns=(time.time_ns(),) * 2)
        except OSError as error:
            logger.info("the index of image sizes is not kept: %s", error)
            return _given(source.names, made)
        return _given(source.names, _load(path, names_id) or made)


def digest_of_files(names: "Paths", lengths: np.ndarray, sizes: np.ndarray) -> str:
    """`Source.identity` of files.

    Args:
        names: of N files.
        lengths: (N,) int64.
        sizes: (N, 2) int32.
    """
    from sslrun.data.sources.base import digest_of

    columns = (names.blob, names.ends, lengths, sizes)
    return digest_of(
        np.ascontiguousarray(column[first : first + _HASHED]).data
        for column in columns
        for first in range(0, len(column), _HASHED)
    )


def _load(path: Path, names_id: str) -> table.Table | None:
    kept = table.load(path)
    return kept if kept is not None and kept.about.get("names") == names_id else None


def _looked_at(path: Path) -> int:
    """When all files were last looked at, in ns of the clock."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _given(names: "Paths", kept: table.Table) -> tuple[np.ndarray, str | None]:
    names.lengths = kept.columns["lengths"]
    sizes = kept.columns["sizes"]
    return np.maximum(sizes, 0) if kept.about["unknown"] else sizes, kept.about["digest"]


def _has_changed(names: "Paths", kept: table.Table, wait: waiting.Wait) -> bool:
    """Whether one of some files is another one than when its size was read, or sizes are not known."""
    if kept.about["unknown"]:
        return True
    rows = _some(len(names))
    at = 0
    for lengths, times in _looks(names, rows, wait):
        ids = rows[at : at + len(lengths)]
        at += len(ids)
        if (kept.columns["lengths"][ids] != lengths).any() or (kept.columns["times"][ids] != times).any():
            return True
    return False


def _some(count: int) -> np.ndarray:
    """Ascending numbers of the files that are looked at: all, or runs of them, others at each start."""
    if count <= LOOKED_AT:
        return np.arange(count)
    generator = np.random.default_rng()
    firsts = np.sort(generator.choice(count // _RUN, LOOKED_AT // _RUN, replace=False, shuffle=False)) * _RUN
    return (firsts[:, None] + np.arange(_RUN)).reshape(-1)


def _looks(names: "Paths", ids: np.ndarray, wait: waiting.Wait) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Lengths and times of files, part by part."""
    from sslrun.data.sources.files import Paths

    assert names.kept is not None
    again = table.load(names.kept[0])  # apart, so that the pages that are touched go at the end
    if again is not None and again.about["id"] == names.kept[1]:
        names = Paths.of(names.root, again.columns["names"], again.columns["ends"])
    return looked_at(lambda part: _look(names, part), ids, wait)


def _look(names: "Paths", ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and times of some files, -1 for those that are missing."""
    found = np.full((2, len(ids)), -1)
    waiting.note(names[int(ids[0])])
    for place, sample in enumerate(ids.tolist()):
        try:
            status = os.stat(names[sample])
            found[0, place], found[1, place] = status.st_size, status.st_mtime_ns
        except (OSError, ValueError):  # a null byte in the name
            pass
    return found[0], found[1]


def _current(source: "FileSource", kept: table.Table | None, wait: waiting.Wait) -> table.Table:
    """A table for the files as they are now; `kept` itself if nothing has changed."""
    start, count = time.monotonic(), len(source)
    lengths, times = np.empty(count, np.int64), np.empty(count, np.int64)
    at = 0
    for part_lengths, part_times in _looks(source.names, np.arange(count), wait):
        end = at + len(part_lengths)
        lengths[at:end], times[at:end] = part_lengths, part_times
        at = end
    sizes = np.full((count, 2), NOT_KNOWN, np.int32)
    if kept is not None:
        same = (kept.columns["lengths"] == lengths) & (kept.columns["times"] == times)
        if same.all() and not kept.about["unknown"]:
            return kept
        sizes[same] = kept.columns["sizes"][same]
    threads = waiting.Threads(THREADS, "sslrun-index")
    try:
        read_missing(source, sizes, threads, wait, is_again=kept is not None and bool(kept.about["unknown"]))
    finally:
        threads.close()
    elapsed_s = time.monotonic() - start
    if elapsed_s > 5:
        logger.info("sizes of %d images read in %.0f s", count, elapsed_s)
    about = {
        "unknown": int((sizes[:, 0] == NOT_KNOWN).sum()),
        "digest": digest_of_files(source.names, lengths, np.maximum(sizes, 0)),
    }
    return table.Table({"lengths": lengths, "times": times, "sizes": sizes}, about)
