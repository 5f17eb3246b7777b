"""Image sizes of files whose list is kept, in a table beside the list that processes share.

Of the files that are known, some are looked at when a table is opened, and all of them for a run that is resumed or if
one of those has changed: length and time of a file must be those of when its size was read.
"""

import itertools
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sslrun.data import table, waiting
from sslrun.data.index import NOT_KNOWN, THREADS, looked_at, read_missing, say_not_kept
from sslrun.data.outage import unreadable
from sslrun.data.sources.base import digest_of
from sslrun.data.sources.paths import Paths

if TYPE_CHECKING:
    from sslrun.data.sources.files import FileSource

logger = logging.getLogger("sslrun")

LOOKED_AT = 16_384
"""Files that are looked at, at least, when a table is opened: all of a smaller source."""

_RUN = 64  # of them that follow each other
_HASHED = 1 << 24  # rows at a time
_MISSING, _NOT_KNOWN = -1, -2  # in place of a length: there is no such file; the storage does not tell


class Sizes(NamedTuple):
    """Sizes of N images.

    Attributes:
        sizes: (N, 2) int32, as `index.read_sizes`; mapped from the table if there is one.
        digest: of names, lengths and sizes; None if it is not known.
        table: holds them in its column `sizes`; None: they are in memory only.
    """

    sizes: np.ndarray
    digest: str | None
    table: table.Table | None


def file_sizes(source: "FileSource", looks_at_all: bool) -> Sizes:
    """Sizes of a source's N images, whose names are kept. Sets their lengths.

    Of the processes that need them at the same time, one reads them and the others wait.

    Args:
        source: opened.
        looks_at_all: whether to look at every file. Otherwise only some are looked at if there are many.

    Raises:
        RunFailed: no image can be read.
        Stopped: the run is asked to stop.
    """
    asked, wait = time.time_ns(), waiting.Wait()
    assert source.names.kept is not None
    names_id = source.names.kept.id
    path = _place(source.names.kept.file)
    kept = _load(path, names_id)
    if kept is not None and not looks_at_all and not _has_changed(source.names, kept, wait):
        return _given(source.names, kept)
    with table.locked(path, wait) as problem:
        kept = _load(path, names_id)
        if kept is not None and kept.about["digest"] and _looked_at(path) >= asked:  # by another process meanwhile
            return _given(source.names, kept)
        made = _current(source, kept, wait)
        made.about["names"] = names_id
        try:
            if problem is not None:
                raise problem
            if made is not kept:
                table.write(path, made.columns, made.about)
            os.utime(path, ns=(time.time_ns(),) * 2)
        except OSError as error:
            say_not_kept(error)
            return _given(source.names, made)
        return _given(source.names, _load(path, names_id) or made)


def carry_over(names_file: Path, before: tuple[Paths, str], after: tuple[Paths, str], wait: waiting.Wait) -> None:
    """Keep the sizes of those files that a new list shares with the one before, so that only the others are read.

    Args:
        names_file: of both lists.
        before: the old list and its id.
        after: the new one.
        wait: for a process that reads sizes for the old list.

    Raises:
        OSError: they cannot be written.
    """
    path = _place(names_file)
    with table.locked(path, wait) as problem:
        kept = _load(path, before[1])
        if problem is not None or kept is None:
            return
        hashes, wanted = _hashes(before[0]), _hashes(after[0])
        order = np.argsort(hashes)
        rows = order[np.minimum(np.searchsorted(hashes, wanted, sorter=order), len(order) - 1)]
        # Files with one hash are taken for the same if their lengths and times are, too, which is seen later.
        is_there = hashes[rows] == wanted
        columns = {name: column[rows] for name, column in kept.columns.items()}
        for column in columns.values():
            column[~is_there] = NOT_KNOWN
        table.write(path, columns, {"names": after[1], "unknown": len(after[0]), "digest": None, "is_again": False})


def digest_of_files(names: Paths, lengths: np.ndarray, sizes: np.ndarray) -> str:
    """`Source.identity` of files.

    Args:
        names: of N files.
        lengths: (N,) int64.
        sizes: (N, 2) int32.
    """
    columns = (names.blob, names.ends, lengths, sizes)
    return digest_of(
        np.ascontiguousarray(column[first : first + _HASHED]).data
        for column in columns
        for first in range(0, len(column), _HASHED)
    )


def _hashes(paths: Paths) -> np.ndarray:
    """A number for each path, equal for equal ones in this process."""
    names, ends = paths.blob.data, paths.ends.data
    hashes = (hash(bytes(names[start:end])) for start, end in itertools.pairwise(ends))
    return np.fromiter(hashes, np.int64, len(paths))


def _place(names_file: Path) -> Path:
    return names_file.with_suffix(".sizes")


def _load(path: Path, names_id: str) -> table.Table | None:
    kept = table.load(path)
    return kept if kept is not None and kept.about.get("names") == names_id else None


def _looked_at(path: Path) -> int:
    """When all files were last looked at, in ns of the clock."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _given(names: Paths, kept: table.Table) -> Sizes:
    kept.drop_pages()
    lengths, sizes, digest = kept.columns["lengths"], kept.columns["sizes"], kept.about["digest"]
    names.lengths = lengths
    if kept.about["unknown"]:
        names.lengths, sizes = np.maximum(lengths, _MISSING), np.maximum(sizes, 0)
        return Sizes(sizes, digest, None)
    return Sizes(sizes, digest, kept if kept.is_mapped else None)


def _has_changed(names: Paths, kept: table.Table, wait: waiting.Wait) -> bool:
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
        kept.drop_pages()
    return False


def _some(count: int) -> np.ndarray:
    """Ascending numbers of the files that are looked at: all, or runs of them, others at each start."""
    if count <= LOOKED_AT:
        return np.arange(count)
    generator = np.random.default_rng()
    firsts = np.sort(generator.choice(count // _RUN, LOOKED_AT // _RUN, replace=False, shuffle=False)) * _RUN
    return (firsts[:, None] + np.arange(_RUN)).reshape(-1)


def _looks(names: Paths, ids: np.ndarray, wait: waiting.Wait) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Lengths and times of files, part by part, with a bar on a terminal."""
    from sslrun.runtime.bar import WholeLine

    bar = WholeLine(None, "looking at files", len(ids), leave=False, dynamic_ncols=True, disable=None, delay=1)
    for part in looked_at(lambda part: _look(names, part), ids, wait):
        bar.update(len(part[0]))
        yield part
    bar.close()


def _look(names: Paths, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and times of some files."""
    found = np.full((2, len(ids)), _MISSING)
    missing: OSError | None = None
    waiting.note(names[int(ids[0])])
    for place, sample in enumerate(ids.tolist()):
        try:
            status = os.stat(names[sample])
            found[0, place], found[1, place] = status.st_size, status.st_mtime_ns
        except FileNotFoundError as error:
            missing = error
        except OSError as error:
            if unreadable(error, names.root).is_outage:
                found[:, place] = _NOT_KNOWN
        except ValueError:  # a null byte in the name
            pass
    if missing is not None and unreadable(missing, names.root).is_outage:  # the folder of them all is gone
        found[:, found[0] == _MISSING] = _NOT_KNOWN
    return found[0], found[1]


def _current(source: "FileSource", kept: table.Table | None, wait: waiting.Wait) -> table.Table:
    """A table for the files as they are now; `kept` itself if nothing has changed."""
    start, count = time.monotonic(), len(source)
    lengths, times = np.empty(count, np.int64), np.empty(count, np.int64)

    def look(ids: np.ndarray) -> None:
        at = 0
        for part_lengths, part_times in _looks(source.names, ids, wait):
            part = ids[at : at + len(part_lengths)]
            lengths[part], times[part] = part_lengths, part_times
            at += len(part)

    look(np.arange(count))
    sizes = np.full((count, 2), NOT_KNOWN, np.int32)
    if kept is not None:
        same = (kept.columns["lengths"] == lengths) & (kept.columns["times"] == times) & (lengths != _NOT_KNOWN)
        if same.all() and not kept.about["unknown"]:
            return kept
        sizes[same] = kept.columns["sizes"][same]
    threads = waiting.Threads(THREADS, "sslrun-index")
    try:
        read_missing(source, sizes, threads, wait, is_again=kept is not None and kept.about["is_again"])
    finally:
        threads.close()
    if (lengths == _NOT_KNOWN).any():  # storage that gave errors, which the reading has waited for
        look(np.flatnonzero(lengths == _NOT_KNOWN))
    elapsed_s = time.monotonic() - start
    if elapsed_s > 5:
        logger.info("sizes of %d images read in %.0f s", count, elapsed_s)
    unknown = int(((sizes[:, 0] == NOT_KNOWN) | (lengths == _NOT_KNOWN)).sum())
    about = {
        "unknown": unknown,
        "is_again": unknown > 0,
        "digest": digest_of_files(source.names, np.maximum(lengths, _MISSING), np.maximum(sizes, 0)),
    }
    return table.Table({"lengths": lengths, "times": times, "sizes": sizes}, about)
