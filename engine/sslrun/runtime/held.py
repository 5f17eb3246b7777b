"""Files and folders that stay open, so that another one under the same name is recognized."""

import os
from pathlib import Path

from sslrun.runtime.durable import read_patiently


class Held:
    """A file or folder as it is now under a path.

    While it is open, no other one gets its inode number, and one that was moved can be found.

    Args:
        path: an existing file or folder.
        descriptor: an open descriptor of it; opened here if None.
        grows: whether it only becomes longer, so that a shorter one has been cut.

    Attributes:
        descriptor: the open descriptor.
    """

    def __init__(self, path: Path, descriptor: int | None = None, *, grows: bool = False) -> None:
        self.path, self._grows = path, grows
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if descriptor is None else descriptor
        self._size = 0
        self._was_writable = _is_writable(path)  # some file systems say no and take all that is written

    def change(self) -> str | None:
        """What has happened to it, such as "was removed"; None if it is still what the path leads to, and writable.

        Raises:
            RunFailed: the storage gives errors.
        """
        held = os.fstat(self.descriptor)
        try:
            found = read_patiently(self.path, os.stat)
        except OSError:
            found = None
        if found is None or not os.path.samestat(found, held):
            place = self.place()
            if place is not None:
                return f"was moved to {place}{'' if found is None else ', and another is in its place,'}"
            return "was removed" if found is None else "was replaced by another"
        before, self._size = self._size, held.st_size
        if self._grows and held.st_size < before:
            return "was cut"
        if self._was_writable and not _is_writable(self.path):
            return "became read-only"
        return None

    def place(self) -> Path | None:
        """The path that leads to it now; None if there is none, or the system does not tell."""
        try:
            place = Path(os.readlink(f"/proc/self/fd/{self.descriptor}"))
            return place if os.path.samestat(os.stat(place), os.fstat(self.descriptor)) else None
        except OSError:
            return None


def _is_writable(path: Path) -> bool:
    return os.access(path, os.W_OK | os.X_OK if path.is_dir() else os.W_OK)
