"""STL-10 (Coates, Lee, Ng 2011)."""

import os
from collections.abc import Sequence
from typing import Literal

import numpy as np

from sslrun.config.paths import FilePath
from sslrun.data.sources.files import exists
from sslrun.data.sources.in_memory import InMemory, numbered, read_lines
from sslrun.errors import UsageError

_IMAGE_BYTES = 3 * 96 * 96


class STL10(InMemory):
    """STL-10 (Coates, Lee, Ng 2011): images of 96 x 96 pixels in 10 classes, and 100,000 without labels.

    The images are kept in memory, 28 kB each: 2.8 GB with the unlabeled ones. They are read from
    `train_X.bin`, `train_y.bin`, ...

    Args:
        data_prefix: folder of these files, or the folder in which the archive was unpacked.
        split: part of the data set, "train" (5,000), "test" (8,000), "unlabeled", or "train+unlabeled"; the last two
            have no labels.
    """

    folders = ("stl10_binary",)

    def __init__(
        self,
        data_prefix: FilePath = "data/stl10",
        split: Literal["train", "test", "unlabeled", "train+unlabeled"] = "train+unlabeled",
    ) -> None:
        super().__init__(data_prefix, split)
        sizes = {"train": 5_000, "test": 8_000, "unlabeled": 100_000}
        self.nominal_size = sum(sizes[part] for part in split.split("+"))

    def list_samples(self, key: str) -> Sequence[str]:
        files = [self.find(key, f"{part}_X.bin") for part in self.split.split("+")]
        counts = [_count(file) for file in files]
        self.pixels = np.empty((sum(counts), 96, 96, 3), dtype=np.uint8)
        rows = 0
        for file in files:
            with open(file, "rb") as images:  # in pieces: the whole file would double the memory
                while piece := images.read(1000 * _IMAGE_BYTES):
                    planes = np.frombuffer(piece, dtype=np.uint8).reshape(-1, 3, 96, 96)  # column after column
                    self.pixels[rows : rows + len(planes)] = planes.transpose(0, 3, 2, 1)
                    rows += len(planes)
        if self.split in ("train", "test"):
            self.labels = np.fromfile(self.find(key, f"{self.split}_y.bin"), dtype=np.uint8).astype(np.int64) - 1
            if len(self.labels) != rows:
                raise UsageError(f"{files[0]} holds {rows} images, but there are {len(self.labels)} labels beside it")
        names = os.path.join(os.path.dirname(files[0]), "class_names.txt")
        self.class_names = read_lines(names) if exists(names) else None
        return numbered(files, counts)


def _count(file: str) -> int:
    """How many images a file holds, by its length."""
    count, rest = divmod(os.path.getsize(file), _IMAGE_BYTES)
    if rest:
        raise UsageError(f"{file} cannot be read: its length is not a multiple of {_IMAGE_BYTES} bytes")
    return count
