"""Some samples of another source, and the split into training and held-out samples."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from sslrun.data.sources.base import Encoded, Source, digest_of
from sslrun.data.sources.paths import Names
from sslrun.errors import UsageError
from sslrun.randomness import HOLDOUT_VIEW, uniforms

if TYPE_CHECKING:
    import torch


class Subset(Source, listed=False):
    """Some samples of an opened source, numbered anew from 0 in the given order. Made by the engine, not by a config.

    Args:
        source: opened.
        ids: (n,) int64, sample ids in the source.
    """

    def __init__(self, source: Source, ids: np.ndarray) -> None:
        self.source = source
        self.names, self._is_open = self._pick(ids), True

    def _pick(self, ids: np.ndarray) -> Names:
        """Take some samples of the source, which is open; their names."""
        self.ids = np.asarray(ids, dtype=np.int64)
        self.labels = None if self.source.labels is None else self.source.labels[self.ids]
        self.class_names, self.is_decoded = self.source.class_names, self.source.is_decoded
        return _Picked(self.source.names, self.ids)

    @property
    def channels(self) -> int:  # type: ignore[override]
        """Channels of the source's images."""
        return self.source.channels

    def size_in_header(self, file: BinaryIO) -> tuple[int, int]:
        return self.source.size_in_header(file)

    def __repr__(self) -> str:
        return f"{len(self)} of {self.source!r}"

    def encoded(self, ids: np.ndarray) -> Sequence[Encoded]:
        return self.source.encoded(self.ids[ids])

    def decoded(self, ids: np.ndarray, device: "torch.device") -> "Sequence[np.ndarray] | np.ndarray | torch.Tensor":
        return self.source.decoded(self.ids[ids], device)

    def open_encoded(self, sample: int) -> BinaryIO:
        return self.source.open_encoded(int(self.ids[sample]))

    def identity(self) -> str:
        return digest_of([self.source.identity().encode(), self.ids.tobytes()])

    def look_at_all(self) -> None:
        self.source.look_at_all()

    @property
    def files_root(self) -> str | None:
        return self.source.files_root

    @property
    def sizes(self) -> np.ndarray:
        if self._sizes is None:
            self._sizes = self.source.sizes[self.ids]
        return self._sizes


def split_holdout(source: Source, fraction: float) -> tuple[Subset, Subset]:
    """Keep some samples out of training: those whose ids have the smallest hashes, the same in every run.

    Args:
        source: opened.
        fraction: of the samples to keep out, in (0, 1); at least one sample is kept out and one is left.

    Returns:
        training and held-out samples, each in the source's order.
    """
    count = holdout_size(len(source), fraction)
    hashes = uniforms(0, 0, np.arange(len(source)), HOLDOUT_VIEW, 2)
    kept_out = np.zeros(len(source), dtype=bool)
    kept_out[np.lexsort((hashes[:, 1], hashes[:, 0]))[:count]] = True
    return Subset(source, np.flatnonzero(~kept_out)), Subset(source, np.flatnonzero(kept_out))


def holdout_size(num_samples: int, fraction: float) -> int:
    """Number of samples to keep out of training. UsageError if the samples cannot be split so."""
    if not 0 < fraction < 1 or num_samples < 2:
        raise UsageError(f"data.holdout = {fraction} cannot split {num_samples} samples: give a fraction in (0, 1)")
    return min(max(round(fraction * num_samples), 1), num_samples - 1)


class _Picked(Names):
    """Names of a subset, looked up in the source's."""

    def __init__(self, names: Sequence[str], ids: np.ndarray) -> None:
        self._names, self._ids = names, ids

    def __len__(self) -> int:
        return len(self._ids)

    def name_at(self, i: int) -> str:
        return self._names[self._ids[i]]
