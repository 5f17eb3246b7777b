"""Writing files that survive a kill or a power cut: first the data is synced, then its name, then the folder."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sslrun.errors import RunFailed


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
    """As `replace_file`; with `makes_folder`, in a folder that is made if it does not exist.

    Raises:
        RunFailed: the file could not be written; the old one is untouched.
    """
    try:
        if makes_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        raise RunFailed(f"{path} could not be written: {error.strerror}") from error


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
