"""Sources whose images are small enough to stay in memory, decoded: CIFAR-10, CIFAR-100, STL-10. With a GPU, in its
memory.

They are read once, in the layouts in which their authors publish them. One array holds all images; batches are rows
of it, and subsets look them up there.
"""

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
import torch

from sslrun.data import cifar_pickle
from sslrun.data.index import Index
from sslrun.data.sources import Paths, Source
from sslrun.errors import UsageError

T = TypeVar("T")


class InMemory(Source, listed=False):
    """Base of sources that keep their images: a subclass fills `pixels` in `_list()` and names each image.

    Args:
        data_prefix: the folder of the published files, or the one around it.
        split: which part.
    """

    in_memory = True
    folders: Sequence[str]
    """Names of the folder that the published archives make."""

    pixels: np.ndarray
    """(N, H, W, 3) uint8."""

    _resident: torch.Tensor | None = None
    """The same on the GPU, where there is one."""

    def __init__(self, data_prefix: str, split: str) -> None:
        self.data_prefix, self.split = data_prefix, split

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data_prefix!r}, {self.split!r})"

    def images(self, ids: np.ndarray, device: torch.device) -> np.ndarray | torch.Tensor:
        if device.type == "cpu":
            return self.pixels[ids]
        if self._resident is None:
            self._resident = torch.from_numpy(self.pixels).to(device)  # once, for all that read this source
        return self._resident[torch.from_numpy(ids).to(device)]

    @cached_property
    def index(self) -> Index:
        """Known without a look."""
        count, height, width, _ = self.pixels.shape
        return Index(np.tile(np.array([[height, width]], dtype=np.int32), (count, 1)), np.zeros(count, dtype=bool))

    def _file(self, key: str, *names: str) -> str:
        """The first file that exists among `names`, in `data_prefix` or in the archives' folder below it."""
        for folder in (self.data_prefix, *(os.path.join(self.data_prefix, name) for name in self.folders)):
            for name in names:
                path = os.path.join(folder, name)
                if os.path.isfile(path):
                    return os.path.abspath(path)
        raise UsageError(
            f"{self.data_prefix} has no {' or '.join(names)}: set {key}.data_prefix to the folder that holds "
            f"{' or '.join(self.folders)}"
        )


class Cifar(InMemory, listed=False):
    """What CIFAR-10 and CIFAR-100 share: images of 32 x 32 pixels, plane by plane, as plain bytes or pickled."""

    label_bytes: int
    """Bytes before each image in the binary version, the last of them its label."""

    label_key: str
    """The labels in a pickled file."""

    name_files: tuple[str, str]
    """What holds the class names beside the images: in the binary version, and pickled."""

    name_key: str
    """The class names in the pickled one."""

    def parts(self) -> list[str]:
        """Names of the files, without the binary version's ending."""
        raise NotImplementedError

    def _list(self, key: str) -> Sequence[str]:
        files = [self._file(key, f"{part}.bin", part) for part in self.parts()]
        sets = [_read(file, self._from_binary if file.endswith(".bin") else self._from_pickled) for file in files]
        counts = [len(planes) for planes, _ in sets]
        self.pixels = np.empty((sum(counts), 32, 32, 3), dtype=np.uint8)
        np.concatenate([planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for planes, _ in sets], out=self.pixels)
        self.labels = np.concatenate([labels for _, labels in sets]).astype(np.int64)
        self.class_names = self._class_names(os.path.dirname(files[0]))
        return _names(files, counts)

    def _from_binary(self, content: bytes) -> tuple[np.ndarray, np.ndarray]:
        record = self.label_bytes + 3072
        if len(content) % record:
            raise ValueError(f"its length is not a multiple of {record} bytes")
        rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
        return rows[:, self.label_bytes :], rows[:, self.label_bytes - 1]

    def _from_pickled(self, content: bytes) -> tuple[np.ndarray, np.ndarray]:
        found = cifar_pickle.read(content)
        pixels, labels = found["data"], found[self.label_key]
        is_known = isinstance(pixels, np.ndarray) and isinstance(labels, list)
        if not is_known or pixels.shape != (len(labels), 3072) or not all(isinstance(label, int) for label in labels):
            raise ValueError("it does not hold images of 3072 bytes with a label each")
        return pixels, np.array(labels)

    def _class_names(self, folder: str) -> list[str] | None:
        text, pickled = (os.path.join(folder, name) for name in self.name_files)
        if os.path.exists(text):
            return _lines(text)
        return list(_read(pickled, cifar_pickle.read)[self.name_key]) if os.path.exists(pickled) else None


class CIFAR10(Cifar):
    """CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32 x 32 pixels in 10 classes.

    Kept in memory, 150 MB. Read from `data_batch_1.bin`, ... (the binary version) or `data_batch_1`, ... (the python
    version, whose pickles are read without being executed).

    Args:
        data_prefix: the folder of these files, or the one in which the archive was unpacked.
        split: "train" or "test".
    """

    folders = ("cifar-10-batches-bin", "cifar-10-batches-py")
    label_bytes = 1
    label_key = "labels"
    name_files = ("batches.meta.txt", "batches.meta")
    name_key = "label_names"

    def __init__(self, data_prefix: str = "data/cifar10", split: Literal["train", "test"] = "train") -> None:
        super().__init__(data_prefix, split)
        self.nominal_size = {"train": 50_000, "test": 10_000}[split]

    def parts(self) -> list[str]:
        return [f"data_batch_{i}" for i in range(1, 6)] if self.split == "train" else ["test_batch"]


class CIFAR100(Cifar):
    """CIFAR-100 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32 x 32 pixels in 100 classes.

    Kept in memory, 150 MB. Read from `train.bin` and `test.bin` (the binary version) or `train` and `test` (the python
    version, whose pickles are read without being executed). Labels are the 100 fine ones.

    Args:
        data_prefix: the folder of these files, or the one in which the archive was unpacked.
        split: "train" or "test".
    """

    folders = ("cifar-100-binary", "cifar-100-python")
    label_bytes = 2
    label_key = "fine_labels"
    name_files = ("fine_label_names.txt", "meta")
    name_key = "fine_label_names"

    def __init__(self, data_prefix: str = "data/cifar100", split: Literal["train", "test"] = "train") -> None:
        super().__init__(data_prefix, split)
        self.nominal_size = {"train": 50_000, "test": 10_000}[split]

    def parts(self) -> list[str]:
        return [self.split]


class STL10(InMemory):
    """STL-10 (Coates, Lee, Ng 2011): images of 96 x 96 pixels in 10 classes, and 100,000 without labels.

    Kept in memory, 28 kB each: 2.8 GB where the unlabeled ones are used. Read from `train_X.bin`, `train_y.bin`, ...

    Args:
        data_prefix: the folder of these files, or the one in which the archive was unpacked.
        split: "train" (5,000), "test" (8,000), "unlabeled", or "train+unlabeled"; the last two have no labels.
    """

    folders = ("stl10_binary",)

    def __init__(
        self,
        data_prefix: str = "data/stl10",
        split: Literal["train", "test", "unlabeled", "train+unlabeled"] = "train+unlabeled",
    ) -> None:
        super().__init__(data_prefix, split)
        sizes = {"train": 5_000, "test": 8_000, "unlabeled": 100_000}
        self.nominal_size = sum(sizes[part] for part in split.split("+"))

    def _list(self, key: str) -> Sequence[str]:
        files = [self._file(key, f"{part}_X.bin") for part in self.split.split("+")]
        counts = [_count(file, _STL_BYTES) for file in files]
        self.pixels = np.empty((sum(counts), 96, 96, 3), dtype=np.uint8)
        rows = 0
        for file in files:
            with open(file, "rb") as images:  # in pieces: the whole file would double the memory
                while piece := images.read(1000 * _STL_BYTES):
                    planes = np.frombuffer(piece, dtype=np.uint8).reshape(-1, 3, 96, 96)  # column after column
                    self.pixels[rows : rows + len(planes)] = planes.transpose(0, 3, 2, 1)
                    rows += len(planes)
        if self.split in ("train", "test"):
            self.labels = np.fromfile(self._file(key, f"{self.split}_y.bin"), dtype=np.uint8).astype(np.int64) - 1
            if len(self.labels) != rows:
                raise UsageError(f"{files[0]} holds {rows} images, but there are {len(self.labels)} labels beside it")
        named = os.path.join(os.path.dirname(files[0]), "class_names.txt")
        self.class_names = _lines(named) if os.path.exists(named) else None
        return _names(files, counts)


_STL_BYTES = 3 * 96 * 96


def _names(files: Sequence[str], counts: Sequence[int]) -> Paths:
    """What each image is called in messages: `FILE#NUMBER`."""
    return Paths("", (f"{file}#{i}" for file, count in zip(files, counts, strict=True) for i in range(count)))


def _count(file: str, record: int) -> int:
    """How many images a file holds, by its length."""
    count, rest = divmod(os.path.getsize(file), record)
    if rest:
        raise UsageError(f"{file} cannot be read: its length is not a multiple of {record} bytes")
    return count


def _read(file: str, parse: Callable[[bytes], T]) -> T:
    with open(file, "rb") as opened:
        content = opened.read()
    try:
        return parse(content)
    except KeyError as error:
        raise UsageError(f"{file} cannot be read: it has no {error}") from None
    except ValueError as error:
        raise UsageError(f"{file} cannot be read: {error}") from None


def _lines(file: str) -> list[str]:
    with open(file, encoding="utf-8") as opened:
        return [line.strip() for line in opened if line.strip()]
