"""Arrays in one file of the cache folder, which processes map into their memory and share.

A table is written beside its place and renamed, by one process at a time. So a reader finds a whole table or none.
"""

import contextlib
import fcntl
import json
import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sslrun.data import waiting

_MAGIC = b"sslrun table 1\n"  # at the end: what ends with it is whole
_ALIGNMENT = 64
_COUNT = 8  # bytes of the length of the description


@dataclass(frozen=True)
class Table:
    """A table that is mapped into memory.

    Attributes:
        columns: arrays by name. What is written to them stays in this process.
        about: the description that was stored with them.
    """

    columns: Mapping[str, np.ndarray]
    about: dict[str, Any]


def write(path: Path, columns: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write a table; the caller holds the lock of `path`.

    Args:
        path: is replaced if it exists.
        columns: arrays by name.
        about: a description that JSON can hold.

    Raises:
        OSError: it cannot be written; the old table is untouched.
    """
    places: dict[str, Any] = {}
    beside = path.with_name(f"{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            for name, column in columns.items():
                file.write(bytes(-file.tell() % _ALIGNMENT))
                places[name] = [file.tell(), column.dtype.str, list(column.shape)]
                file.write(np.ascontiguousarray(column).reshape(-1).view(np.uint8).data)
            description = json.dumps({"places": places, "about": dict(about)}).encode()
            file.write(description + len(description).to_bytes(_COUNT, "little") + _MAGIC)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def load(path: Path) -> Table | None:
    """The table at `path`; None if there is none, or none that can be read."""
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        end = len(content) - len(_MAGIC) - _COUNT
        if end < 0 or content[end + _COUNT :] != _MAGIC:
            return None
        start = end - int.from_bytes(content[end : end + _COUNT], "little")
        description = json.loads(content[start:end])
        columns = {}
        for name, (place, kind, shape) in description["places"].items():
            count = int(np.prod(shape, dtype=np.int64))
            columns[name] = np.frombuffer(content, kind, count, place).reshape(shape)
        return Table(columns, description["about"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def locked(path: Path, go_on: Callable[[], None]) -> Iterator[bool]:
    """Keeps other processes from writing the table at `path`; they wait here. The lock ends with its process.

    Args:
        path: of the table; its folder is made.
        go_on: called every now and then while another process holds the lock; it may raise to end the wait.

    Yields:
        Whether the table can be written: False if the folder is read-only or knows no locks.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            stack.callback(os.close, descriptor)
            while not _is_taken(descriptor):
                with waiting.doing(str(path), "is being made by another process"):
                    go_on()
                    time.sleep(waiting.STEP_S)
            is_writable = True
        except OSError:
            is_writable = False
        yield is_writable


def _is_taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
