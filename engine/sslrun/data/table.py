"""Arrays in one file of the cache folder, which processes map into their memory and share.

A table is written beside its place and renamed, by one process at a time. So a reader finds a whole table or none.
"""

import contextlib
import fcntl
import glob
import json
import mmap
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sslrun.data import waiting

# At the end of the file: a description of the columns, its length, the sum of all bytes before, and this.
_MAGIC = b"sslrun table 2\n"
_COUNT, _SUM = 8, 4  # bytes
_TAIL = _COUNT + _SUM + len(_MAGIC)
_ALIGNMENT = 64
_CHUNK = 1 << 18  # fits into a core's cache
_DAY_S = 86_400
_OLD = {".tmp": (1, 0), ".old": (30, 3)}  # files that are no tables: days that they are left, and how many at most


class Table:
    """A table that is mapped into memory.

    Args:
        columns: arrays by name. What is written to them stays in this process.
        about: the description that was stored with them.
        content: what the arrays are parts of; None: they are in memory only.
        file: the same, opened.
        places: where each column begins in it.
    """

    def __init__(
        self,
        columns: Mapping[str, np.ndarray],
        about: dict[str, Any],
        content: mmap.mmap | None = None,
        file: BinaryIO | None = None,
        places: Mapping[str, int] | None = None,
    ) -> None:
        self.columns, self.about, self._content = columns, about, content
        self._file, self._places = file, places or {}

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def is_mapped(self) -> bool:
        """Whether there is a file, which `read` and `rows` need."""
        return self._file is not None

    def read(self, name: str, start: int, end: int) -> bytes:
        """Some bytes of a column, from `start` to `end`, without mapping the pages around them, of which a name here
        and a name there would soon take in the whole column.

        Raises:
            OSError: they cannot be read.
        """
        assert self._file is not None
        return os.pread(self._file.fileno(), end - start, self._places[name] + start)

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Some rows of a column, (n, ...), as they are in the file, read as `read` does.

        Args:
            name: of a column (N, ...).
            ids: (n,) int64, 0 to N - 1.

        Raises:
            OSError: they cannot be read.
        """
        column = self.columns[name]
        size = column.nbytes // max(1, len(column))
        content = bytearray().join(self.read(name, size * i, size * (i + 1)) for i in ids.tolist())
        return np.frombuffer(content, column.dtype).reshape(len(ids), *column.shape[1:])

    def drop_pages(self) -> None:
        """Take the pages that were read out of this process's memory, and what was written to them. They come back from
        the file when they are read again."""
        if self._content is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._content.madvise(mmap.MADV_DONTNEED)


def write(path: Path, columns: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write a table; the caller holds the lock of `path`.

    Args:
        path: is replaced if it exists.
        columns: arrays by name.
        about: a description that JSON can hold.

    Raises:
        OSError: it cannot be written; the old table is untouched.
    """
    _delete_old(path)
    places: dict[str, Any] = {}
    # A name of its own: not all file systems lock a file against other machines.
    mark = os.urandom(8).hex()
    beside = path.with_name(f"{path.name}.{mark}.tmp")
    try:
        with open(beside, "wb") as file:
            total = 0
            for name, column in columns.items():
                column = np.ascontiguousarray(column)
                gap = bytes(-file.tell() % _ALIGNMENT)
                places[name] = [file.tell() + len(gap), column.dtype.str, list(column.shape)]
                for part in (gap, column.reshape(-1).view(np.uint8).data):
                    total = zlib.crc32(part, total)
                    file.write(part)
            text = json.dumps({"places": places, "about": dict(about)}).encode()
            text += len(text).to_bytes(_COUNT, "little")
            file.write(text + zlib.crc32(text, total).to_bytes(_SUM, "little") + _MAGIC)
            file.flush()
            os.fsync(file.fileno())
        # A process of another machine that has the old table mapped would be killed if its file were gone.
        with contextlib.suppress(OSError):
            os.link(path, path.with_name(f"{path.name}.{mark}.old"))
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def load(path: Path) -> Table | None:
    """The table at `path`; None if there is none, or none that is whole. All of it is read, without staying in this
    process's memory."""
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(path, "rb", buffering=0))
            end = file.seek(0, os.SEEK_END) - _TAIL
            if end < 0:
                return None
            file.seek(end)
            tail = file.read(_TAIL)
            start = end - int.from_bytes(tail[:_COUNT], "little")
            total = int.from_bytes(tail[_COUNT : _COUNT + _SUM], "little")
            if tail[_COUNT + _SUM :] != _MAGIC or start < 0 or _sum(file, end + _COUNT) != total:
                return None
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            description = json.loads(content[start:end])
            columns = {}
            for name, (place, kind, shape) in description["places"].items():
                count = int(np.prod(shape, dtype=np.int64))
                columns[name] = np.frombuffer(content, kind, count, place).reshape(shape)
            stack.pop_all()  # the file stays open
            places = {name: place for name, (place, *_) in description["places"].items()}
            return Table(columns, description["about"], content, file, places)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sum(file: BinaryIO, count: int) -> int:
    """Checksum of the first bytes of a file, which is not buffered."""
    file.seek(0)
    total, chunk = 0, memoryview(bytearray(_CHUNK))
    while count > 0 and (found := file.readinto(chunk[: min(count, _CHUNK)])):  # type: ignore[attr-defined]
        total = zlib.crc32(chunk[:found], total)
        count -= found
    return total


def _delete_old(path: Path) -> None:
    """Delete what killed writers have left, and tables that were replaced so long ago that nobody uses them."""
    for ending, (days, most) in _OLD.items():
        times = []
        for file in path.parent.glob(f"{glob.escape(path.name)}.*{ending}"):
            with contextlib.suppress(OSError):
                times.append((file.stat().st_ctime, file))
        for place, (changed, file) in enumerate(sorted(times, reverse=True), start=1):
            if changed < time.time() - days * _DAY_S or 0 < most < place:
                with contextlib.suppress(OSError):
                    file.unlink()


@contextlib.contextmanager
def locked(path: Path, go_on: Callable[[], None]) -> Iterator[OSError | None]:
    """Keeps other processes from writing the table at `path`; they wait here. The lock ends with its process.

    Args:
        path: of the table; its folder is made.
        go_on: called every now and then while another process holds the lock; it may raise to end the wait.

    Yields:
        None, or why the table cannot be written: the folder is read-only or knows no locks.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            stack.callback(os.close, descriptor)
            while not _is_taken(descriptor):
                with waiting.doing(str(path), "is being made by another process"):
                    go_on()
                    time.sleep(waiting.STEP_S)
        except OSError as error:
            problem = error
        yield problem


def _is_taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
