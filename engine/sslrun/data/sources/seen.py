"""The folders and text files that a list of images was made from, and whether they have changed since."""

import os
from array import array
from collections.abc import Mapping

import numpy as np

from sslrun.data import waiting
from sslrun.data.index import looked_at
from sslrun.data.sources.base import may_pass
from sslrun.data.sources.paths import Paths

_ABSENT = (-1, -1, -1)
# A folder that changed just before it was listed may change again without another time: file systems count in steps of
# up to 2 s.
SETTLED_S = 2.0
_MOUNTS = "/proc/self/mountinfo"


class Seen:
    """Folders and files with the lengths and times that they had before they were read.

    A folder's times change when something in it is added, removed or renamed.
    """

    def __init__(self) -> None:
        self._names: list[bytes] = []
        self._are_read = array("b")
        self._stamps = array("q")  # of each: length, time of the content, time of the entry, in bytes and ns
        self._devices: set[int] = set()

    def read(self, path: str) -> None:
        """Add a folder or a file that is read next.

        Raises:
            OSError: it cannot be opened.
        """
        self._add(path, True, _status(path, is_read=True))

    def linked(self, path: str) -> None:
        """Add a path that is only asked for what it leads to, which may be nothing.

        Raises:
            OSError: the storage gives errors.
        """
        self._add(path, False, _found(path, is_read=False))

    def update(self, other: "Seen") -> None:
        """Add all that another one has."""
        self._names += other._names
        self._are_read += other._are_read
        self._stamps += other._stamps
        self._devices |= other._devices

    def _add(self, path: str, is_read: bool, status: os.stat_result | None) -> None:
        self._names.append(os.fsencode(os.path.abspath(path)))
        self._are_read.append(is_read)
        self._stamps.extend(_stamp(status))
        if status is not None:
            self._devices.add(status.st_dev)

    def is_settled(self, start_ns: int) -> bool:
        """Whether the times are old enough, so that all changes after the listing, which began at `start_ns`, show."""
        return max(self._stamps, default=0) < start_ns - SETTLED_S * 1e9

    def has_times(self) -> bool:
        """Whether the times of all folders change when something is added to them."""
        return not self._devices & _without_times()

    def columns(self) -> dict[str, np.ndarray]:
        """All that `has_changed` needs, as arrays for a table."""
        paths = Paths("", map(os.fsdecode, self._names))
        stamps = np.frombuffer(self._stamps, np.int64).reshape(-1, 3)
        are_read = np.frombuffer(self._are_read, np.int8)
        return {"seen": paths.blob, "seen_ends": paths.ends, "seen_stamps": stamps, "seen_are_read": are_read}


def has_changed(columns: Mapping[str, np.ndarray], wait: waiting.Wait) -> bool:
    """Whether one of the folders and files of `Seen.columns` is another one now, or may not be read any more.

    Raises:
        OSError: the storage gives errors.
        Stopped: the run is asked to stop.
    """
    paths = Paths.of("", columns["seen"], columns["seen_ends"])
    stamps, are_read = columns["seen_stamps"], columns["seen_are_read"]

    def are_same(ids: np.ndarray) -> bool:
        waiting.note(paths[int(ids[0])])
        found = [_stamp(_found(paths[i], bool(are_read[i]))) for i in ids.tolist()]
        return bool((stamps[ids] == found).all())

    return not all(looked_at(are_same, np.arange(len(paths)), wait))


def _found(path: str, is_read: bool) -> os.stat_result | None:
    try:
        return _status(path, is_read)
    except ValueError:  # a null byte in the name
        return None
    except OSError as error:
        if may_pass(error):
            raise
        return None


def _status(path: str, is_read: bool) -> os.stat_result:
    """What is known about a path. What is read is opened: that shows whether it may be, and has a network file system
    ask its server for times that it may have remembered."""
    if not is_read:
        return os.stat(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)


def _stamp(status: os.stat_result | None) -> tuple[int, int, int]:
    return _ABSENT if status is None else (status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _without_times() -> set[int]:
    """Devices of file systems in user space: the folders of many, such as mounts of object stores, keep their time when
    files are added."""
    devices = set()
    try:
        with open(_MOUNTS, encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                words, _, kinds = line.partition(" - ")
                if kinds.split(" ", 1)[0].partition(".")[0] == "fuse":
                    major, _, minor = words.split()[2].partition(":")
                    devices.add(os.makedev(int(major), int(minor)))
    except (OSError, ValueError, IndexError):  # no Linux
        pass
    return devices
