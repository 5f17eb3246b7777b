"""A folder of images on storage that fails or hangs as a test says."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
from PIL import Image

from sslrun.data import waiting
from sslrun.data.bad_samples import BadSamples
from sslrun.data.loader import Loader
from sslrun.data.order import Sequential
from sslrun.data.sources import Source
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.transforms import RandomResizedCrop
from sslrun.data.views import ViewGroup

NUM_IMAGES = 40


def write_images(root: Path) -> Path:
    """Two class folders of small JPEGs of many sizes; image i is `i % 2`/i.jpg."""
    random = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        path = root / f"{2 * i // NUM_IMAGES}" / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((30 + i % 5, 40), Image.Resampling.BICUBIC).save(path, quality=90)
    return root


class Faulty(ImageFolder, listed=False):
    """Attributes:
    errors: file name -> errno that reading it gives; "" stands for every file.
    hung: names of files that are not read before `released` is set.
    reads: how often each file was asked for.
    """

    def __init__(self, data_prefix: str) -> None:
        super().__init__(data_prefix)
        self.errors: dict[str, int] = {}
        self.hung: set[str] = set()
        self.released = threading.Event()
        self.reads: dict[str, int] = {}

    def encoded(self, ids):
        return [self._touched(sample) or super(Faulty, self).encoded(np.array([sample]))[0] for sample in ids.tolist()]

    def open_encoded(self, sample):
        return self._touched(sample) or super().open_encoded(sample)

    def _touched(self, sample: int) -> None:
        path = self.names[sample]
        name = os.path.basename(path)
        waiting.note(path)  # as the reading of a file does
        self.reads[name] = self.reads.get(name, 0) + 1
        if name in self.hung:
            self.released.wait()
        if number := self.errors.get(name) or self.errors.get(""):
            raise OSError(number, os.strerror(number), path)


class After:
    """A table of errors that change with every question: the first ones give `number`, later ones nothing."""

    def __init__(self, count: int, number: int = errno.EIO, names: tuple[str, ...] = ("",)) -> None:
        self.left, self.number, self.names = count, number, names

    def get(self, name: str) -> int | None:
        if name not in self.names or self.left <= 0:
            return None
        self.left -= 1
        return self.number


def opened(root: Path, kind: type[Source] = Faulty) -> Faulty:
    source = kind(str(root))
    source.open()
    assert isinstance(source, Faulty)
    return source


def loader_of(source: Source, bad: BadSamples | None = None, **options) -> Loader:
    options = {"sampler": Sequential(len(source)), "seed": 3, "batch_size": 8, "prefetch": 1} | options
    return Loader(source, [ViewGroup(2, [RandomResizedCrop(12)])], bad=bad, **options)


def epochs(count: int = 1, batch_size: int = 8) -> list[tuple[int, np.ndarray]]:
    return [(e, np.arange(i, i + batch_size)) for e in range(count) for i in range(0, NUM_IMAGES, batch_size)]


def rows(batches) -> list[tuple[int, bytes]]:
    """(sample, pixels) at each position."""
    delivered = []
    for batch in batches:
        pairs = batch.views[0].reshape(2, len(batch.index), -1).transpose(0, 1)
        delivered += [(int(sample), pair.numpy().tobytes()) for sample, pair in zip(batch.index, pairs, strict=True)]
    return delivered
