"""Names of samples that take little memory: put together when they are asked for."""

import os
import sys
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np

if TYPE_CHECKING:
    from sslrun.data.sources.seen import Seen
    from sslrun.data.table import Table


class Names(Sequence[str]):
    """Names that are put together when they are asked for: a subclass implements `name_at`, for 0 to N - 1, and
    `__len__`."""

    def name_at(self, i: int) -> str:
        """Name of sample i."""
        raise NotImplementedError

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self.name_at(k) for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self.name_at(int(i) % len(self))


class Kept(NamedTuple):
    """Where a list of paths is kept.

    Attributes:
        file: the table.
        id: of this list; another list in the same file has another one.
        table: the table, mapped into memory.
    """

    file: Path
    id: str
    table: "Table"


class Paths(Names):
    """File paths below one folder, kept as one string of bytes: a million take their bytes and eight more each.

    Args:
        root: folder that relative paths start from; absolute paths ignore it.
        relative: the paths, consumed once.
        seen: the folders and files that the paths were found in; filled while `relative` is consumed. None: the paths
            were found in another way.

    Attributes:
        blob: (n,) uint8, the paths one after the other; mapped from the file if they are kept.
        ends: (N + 1,) int64, where each path begins and the last one ends; as `blob`.
        lengths: (N,) int64, bytes of each file; -1 for those that are missing or have not been looked at.
        kept: where they are kept; None if they are in memory only.
    """

    kept: Kept | None = None

    def __init__(self, root: str, relative: Iterable[str], seen: "Seen | None" = None) -> None:
        blob, ends = bytearray(), array("q", [0])
        for path in relative:
            blob += os.fsencode(path)
            ends.append(len(blob))
        self._set(root, np.frombuffer(blob, np.uint8), np.frombuffer(ends, np.int64), seen)

    @classmethod
    def of(cls, root: str, blob: np.ndarray, ends: np.ndarray) -> "Paths":
        """Paths whose arrays exist already."""
        paths = cls.__new__(cls)
        paths._set(root, blob, ends)
        return paths

    def _set(self, root: str, blob: np.ndarray, ends: np.ndarray, seen: "Seen | None" = None) -> None:
        self.root, self.blob, self.ends, self.seen = root, blob, ends, seen
        self._lengths: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        if self._lengths is None:
            self._lengths = np.full(len(self), -1)
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: np.ndarray) -> None:
        self._lengths = lengths

    def ending_with(self, suffixes: Iterable[str]) -> np.ndarray:
        """Ascending numbers of the paths with one of some lower-case suffixes, in letters of any case."""
        lengths = np.diff(self.ends)
        found = np.zeros(len(self), dtype=bool)
        for suffix in map(os.fsencode, suffixes):
            long_enough = np.flatnonzero(lengths >= len(suffix))
            places = self.ends[1:][long_enough, None] + np.arange(-len(suffix), 0)
            found[long_enough] |= (self.blob[places] | 32 == np.frombuffer(suffix, dtype=np.uint8) | 32).all(axis=1)
        return np.flatnonzero(found)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def name_at(self, i: int) -> str:
        if self.kept is None:
            name = self.blob[self.ends[i] : self.ends[i + 1]].tobytes()
        else:
            bounds = self.kept.table.read("ends", 8 * i, 8 * i + 16)
            start, end = (int.from_bytes(part, sys.byteorder) for part in (bounds[:8], bounds[8:]))
            name = self.kept.table.read("names", start, end)
        return os.path.join(self.root, os.fsdecode(name))
