"""The lock of a run folder: one process holds it while it runs, and any process can ask whether it is held.

It is a POSIX record lock (`fcntl.lockf`) on the file `.lock`: it works over NFS, forked workers that outlive the run do
not inherit it, and the system releases it however the process ends.
"""

import fcntl
import logging
import os
import socket
import stat
import time
from pathlib import Path

from sslrun.errors import UsageError

logger = logging.getLogger(__name__)

NAME = ".lock"
RETRY_S = 0.1  # `is_held` of another process takes the lock for less than that


def take(folder: Path, what: str = "the run folder") -> int:
    """Make a folder and take its lock. The lock lasts until the returned descriptor is closed or the process ends.

    On a file system without locks this is a warning.

    Args:
        folder: the folder.
        what: what it is called in messages.

    Raises:
        UsageError: the folder cannot be written, or another process holds the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UsageError(
            f"the run folder {folder} cannot be written: {getattr(error, 'strerror', None) or error}; set work_dir "
            "(or --work-dir) to a folder that can"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"{folder / NAME} is not a regular file: remove it")
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            time.sleep(RETRY_S)
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise UsageError(f"{what} {folder} is in use by {holder}") from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): make sure that no second run uses it", folder, error.strerror)
        return descriptor
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def is_held(folder: Path) -> bool | None:
    """Whether another process holds a folder's lock; None if the lock cannot be asked for.

    The process that holds the lock must not call this: closing any descriptor of a file releases the process's locks.
    """
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks, or one that does not let this user lock
        return None
    finally:
        os.close(descriptor)
    return False
