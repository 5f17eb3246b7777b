"""Some samples of another source, and the split into training and held-out samples.

Labels and sizes of a batch are looked up in the source; what a run copies of them is what somebody asks for as a whole.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from sslrun.data.sources.base import Encoded, Source, digest_of
from sslrun.data.sources.paths import Names
from sslrun.errors import UsageError
from sslrun.randomness import HOLDOUT_VIEW, words

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 18  # samples whose hashes are computed at once


class Subset(Source, listed=False):
    """Some samples of an opened source, numbered anew from 0 in the given order. Made by the engine, not by a config.

    Args:
        source: opened.
        ids: (n,) int64, sample ids in the source.
    """

    _ids: "np.ndarray | _AllBut"
    _labels: np.ndarray | None = None

    def __init__(self, source: Source, ids: "np.ndarray | _AllBut") -> None:
        self.source = source
        self.names, self._is_open = self._pick(ids), True

    def _pick(self, ids: "np.ndarray | _AllBut") -> Names:
        """Take some samples of the source, which is open; their names."""
        self._ids = ids if isinstance(ids, _AllBut) else np.asarray(ids, dtype=np.int64)
        self.class_names, self.is_decoded = self.source.class_names, self.source.is_decoded
        return _Picked(self.source.names, self._ids)

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64, sample ids in the source."""
        return self._ids[np.arange(len(self._ids))] if isinstance(self._ids, _AllBut) else self._ids

    @property
    def labels(self) -> np.ndarray | None:  # type: ignore[override]
        if self._labels is None and self._is_open:
            self._labels = self.source.labels_of(self.ids)
        return self._labels

    def labels_of(self, ids: np.ndarray) -> np.ndarray | None:
        return self.source.labels_of(self._ids[ids]) if self._labels is None else self._labels[ids]

    @property
    def channels(self) -> int:  # type: ignore[override]
        """Channels of the source's images."""
        return self.source.channels

    def size_in_header(self, file: BinaryIO) -> tuple[int, int]:
        return self.source.size_in_header(file)

    def __repr__(self) -> str:
        return f"{len(self)} of {self.source!r}"

    def encoded(self, ids: np.ndarray) -> Sequence[Encoded]:
        return self.source.encoded(self._ids[ids])

    def decoded(self, ids: np.ndarray, device: "torch.device") -> "Sequence[np.ndarray] | np.ndarray | torch.Tensor":
        return self.source.decoded(self._ids[ids], device)

    def open_encoded(self, sample: int) -> BinaryIO:
        return self.source.open_encoded(int(self._ids[sample]))

    def identity(self) -> str:
        parts = (np.ascontiguousarray(self._ids[rows]).data for rows in _chunks(len(self._ids)))
        return digest_of(itertools.chain([self.source.identity().encode()], parts))

    def look_at_all(self) -> None:
        self.source.look_at_all()

    @property
    def files_root(self) -> str | None:
        return self.source.files_root

    @property
    def sizes(self) -> np.ndarray:
        return self.source.sizes_of(self.ids)

    def sizes_of(self, ids: np.ndarray) -> np.ndarray:
        return self.source.sizes_of(self._ids[ids])

    def has_size(self, sample: int) -> bool:
        return self.source.has_size(int(self._ids[sample]))

    def set_size(self, sample: int, size: tuple[int, int]) -> bool:
        return self.source.set_size(int(self._ids[sample]), size)


def split_holdout(source: Source, fraction: float) -> tuple[Subset, Subset]:
    """Keep some samples out of training: those whose ids have the smallest hashes, the same in every run.

    Args:
        source: opened.
        fraction: of the samples to keep out, in (0, 1); at least one sample is kept out and one is left.

    Returns:
        training and held-out samples, each in the source's order.
    """
    count = holdout_size(len(source), fraction)
    hashes = np.empty(len(source), dtype=np.uint64)
    for rows in _chunks(len(source)):
        high, low = words(0, 0, rows, HOLDOUT_VIEW, 2).T
        hashes[rows] = high << np.uint64(32) | low
    last = np.partition(hashes, count - 1)[count - 1]
    below, equal = np.flatnonzero(hashes < last), np.flatnonzero(hashes == last)
    kept_out = np.sort(np.concatenate([below, equal[: count - len(below)]]))
    return Subset(source, _AllBut(len(source), kept_out)), Subset(source, kept_out)


def holdout_size(num_samples: int, fraction: float) -> int:
    """Number of samples to keep out of training. UsageError if the samples cannot be split so."""
    if not 0 < fraction < 1 or num_samples < 2:
        raise UsageError(f"data.holdout = {fraction} cannot split {num_samples} samples: give a fraction in (0, 1)")
    return min(max(round(fraction * num_samples), 1), num_samples - 1)


def _chunks(count: int) -> Iterator[np.ndarray]:
    """The numbers from 0 to count - 1, some at a time."""
    for start in range(0, count, _CHUNK):
        yield np.arange(start, min(start + _CHUNK, count))


class _AllBut:
    """The ids of all samples but some, computed when they are asked for: they take the memory of the few.

    Args:
        count: number N of all samples.
        left_out: (n,) int64, ids of those that are left out, ascending.
    """

    def __init__(self, count: int, left_out: np.ndarray) -> None:
        self._count = count - len(left_out)
        self._before = left_out - np.arange(len(left_out))  # how many of the others have smaller ids than each

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, places: np.ndarray | int) -> np.ndarray:
        """Ids at places from 0 to N - n - 1, int64."""
        return np.asarray(places + np.searchsorted(self._before, places, side="right"))


class _Picked(Names):
    """Names of a subset, looked up in the source's."""

    def __init__(self, names: Sequence[str], ids: np.ndarray | _AllBut) -> None:
        self._names, self._ids = names, ids

    def __len__(self) -> int:
        return len(self._ids)

    def name_at(self, i: int) -> str:
        return self._names[int(self._ids[i])]
