"""Writing that survives a kill or a power cut: data first, then the name, then the folder that holds the name."""

import errno
import os
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Make the names in a folder (new files, renames) survive a power cut, where the file system can do that."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk. The folder is not synced."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file, or create it: a reader sees the old content or the new, never a part."""
    beside = path.with_name(path.name + ".tmp")
    try:
        write_file(beside, data)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
