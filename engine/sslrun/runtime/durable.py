"""Writing files that survive a kill or a power cut, and reading files from storage that may fail for a moment.

What is written is synced in this order: the data, its name, the folder.
"""

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from sslrun.errors import RunFailed, UsageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S = 60.0  # how long storage that gives errors is tried again
FIRST_PAUSE_S = 0.5  # before the second attempt; each pause is twice the one before
# What these say of a path stays true; all others (I/O error, stale handle, permission) may be a fault of the storage.
_DEFINITE = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,  # a name that the file system cannot hold
    errno.EILSEQ,
    errno.ENXIO,  # a socket, or a device without its hardware
    errno.ENODEV,
    errno.EFBIG,  # longer than what is looked for
)


def is_outage(error: OSError) -> bool:
    """Whether the storage or the network is at fault, so that the error says nothing about what is stored there."""
    if error.errno is None:  # not the system's own
        return isinstance(error, (TimeoutError, ConnectionError))
    return error.errno not in _DEFINITE


def read_patiently(path: Path, read: Callable[[Path], T]) -> T:
    """`read(path)`, tried again for `RETRY_S` seconds while the storage gives errors.

    Raises:
        OSError: there is no such file or folder, or the path is of the other kind; at once.
        RunFailed: the storage still gives errors. That says nothing about what is stored there.
    """
    deadline, pause_s = time.monotonic() + RETRY_S, FIRST_PAUSE_S
    while True:
        try:
            return read(path)
        except OSError as error:
            if not is_outage(error):
                raise
            problem = f"{error.filename or path} cannot be read: {error.strerror or error}"
            if time.monotonic() >= deadline:
                raise RunFailed(f"{problem} (tried for {RETRY_S:.0f} s)") from error
        if pause_s == FIRST_PAUSE_S:
            logger.warning("%s; trying again for %.0f s", problem, RETRY_S)
        time.sleep(min(pause_s, max(0.0, deadline - time.monotonic())))
        pause_s *= 2


def sync_directory(path: Path) -> None:
    """Make new and renamed files in a folder survive a power cut, if the file system supports that."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and wait until its data is on the disk. The folder is not synced."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Replace or create a file. A reader sees the old content or the new, never a part of it."""
    beside = path.with_name(path.name + ".tmp")
    try:
        write_file(beside, data)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def replace_or_fail(path: Path, data: bytes, makes_folder: bool = False) -> None:
    """As `replace_file`; `makes_folder` makes the folder of the file, but not those above it, if it does not exist.

    Raises:
        RunFailed: the file could not be written; the old one is untouched.
    """
    try:
        if makes_folder:
            path.parent.mkdir(exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        raise RunFailed(f"{path} could not be written: {error.strerror}") from error


def require_free(path: Path, force: bool) -> None:
    """Raises a UsageError, before any work is done, if no file can be written at `path`; `force` allows to replace
    one."""
    if path.is_dir():
        raise UsageError(f"{path}: is a folder, not a file")
    if os.path.lexists(path) and not force:
        raise UsageError(f"{path} exists; --force replaces it")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path}: {path.parent} cannot be written to")


@contextlib.contextmanager
def arriving(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, at which the block creates a file or a folder.

    If the block succeeds, the result is synced and replaces `path`. If it fails, the result is removed and `path` is
    unchanged.
    """
    path = Path(os.path.abspath(path))  # "." has no name to derive another from
    beside, aside = (path.with_name(f"{path.name}.{os.getpid()}{ending}") for ending in (".tmp", ".old.tmp"))
    try:
        _remove(beside)
        yield beside
        for part in [beside, *beside.rglob("*")]:
            if part.is_file():
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
            else:
                sync_directory(part)
        if beside.is_dir() and path.exists():  # a rename cannot replace a folder that is not empty
            os.replace(path, aside)
        os.replace(beside, path)
        sync_directory(path.parent)
    finally:
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        for leftover in (beside, aside):
            with contextlib.suppress(OSError):
                _remove(leftover)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
