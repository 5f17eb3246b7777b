"""Few labels: a part of a source, as semi-supervised protocols train on (1 % and 10 % of ImageNet)."""

import os
from collections.abc import Sequence

import numpy as np

from sslrun.config.paths import FilePath
from sslrun.data.sources.annotations import text_lines
from sslrun.data.sources.base import Source
from sslrun.data.sources.subset import Subset
from sslrun.errors import UsageError
from sslrun.randomness import FRACTION_VIEW, words


class Fraction(Subset):
    """A part of a source's samples: a share of each class, or those that a file names.

    Args:
        source: the source that samples are taken from.
        share: part of each class to keep, in (0, 1], at least one sample of each class; part of all samples if there
            are no classes. With the same seed, a larger share contains a smaller one.
        names: text file with one file name of an image per line, such as SimCLR's `1percent.txt`; replaces `share`.
        seed: seed of the choice.
    """

    lists_storage = False  # its source does

    def __init__(
        self, source: Source, share: float | None = None, names: FilePath | None = None, seed: int = 0
    ) -> None:
        if (share is None) == (names is None):
            raise ValueError("expected either share or names")
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"share is {share}, expected above 0 and at most 1")
        self.source, self.share, self.names_file, self.seed = source, share, names, seed

    def __repr__(self) -> str:
        return f"{self.names_file or f'{100 * (self.share or 0):g} %'} of {self.source!r}"

    @property
    def nominal_size(self) -> int | None:  # type: ignore[override]
        """Number of samples of a share; the rounding within each class is left out."""
        whole = self.source.nominal_size
        return None if whole is None or self.share is None else max(1, round(self.share * whole))

    def make_nothing(self) -> None:
        self.source.make_nothing()

    def list_samples(self, key: str) -> Sequence[str]:
        self.source.open(f"{key}.source")
        ids = self._drawn(self.share) if self.share is not None else self._named(self.names_file or "", key)
        return self._pick(ids)

    def _drawn(self, share: float) -> np.ndarray:
        """Of each class the samples with the smallest hashes."""
        hashes = words(self.seed, 0, np.arange(len(self.source)), FRACTION_VIEW, 1)[:, 0]
        labels = np.zeros(len(hashes), dtype=np.int64) if self.source.labels is None else self.source.labels
        order = np.lexsort((hashes, labels))
        _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
        place = np.arange(len(order)) - np.repeat(starts, sizes)  # within its class
        return np.sort(order[place < np.repeat(np.maximum(1, np.rint(share * sizes)), sizes)])

    def _named(self, names: str, key: str) -> np.ndarray:
        advice = f"set {key}.names to a file of file names"
        wanted = {os.path.basename(line.strip()) for line in text_lines(names, advice)}
        ids = [i for i, name in enumerate(self.source.names) if not wanted.isdisjoint(_file_names(name))]
        if len(ids) != len(wanted):
            raise UsageError(f"{names} names {len(wanted)} images, of which {self.source!r} has {len(ids)}")
        return np.asarray(ids, dtype=np.int64)


def _file_names(name: str) -> tuple[str, str]:
    """The last part of a path, and of a member of an archive (`ARCHIVE#MEMBER`)."""
    return os.path.basename(name), os.path.basename(name.rpartition("#")[2])
