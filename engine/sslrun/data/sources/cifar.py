"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), from the binary or the python version."""

import os
from collections.abc import Sequence
from typing import Literal

import numpy as np

from sslrun.config.paths import FilePath
from sslrun.data.sources import cifar_pickle
from sslrun.data.sources.files import exists
from sslrun.data.sources.in_memory import InMemory, numbered, parse_file, read_lines


class Cifar(InMemory, listed=False):
    """Base of both: images of 32 x 32 pixels, plane by plane, as plain bytes or pickled."""

    label_bytes: int
    """Bytes before each image in the binary version; the last of them is its label."""

    label_key: str
    """Key of the labels in a pickled file."""

    name_files: tuple[str, str]
    """Files of the class names: in the binary version, and pickled."""

    name_key: str
    """Key of the class names in the pickled one."""

    def parts(self) -> list[str]:
        """Names of the files, without the binary version's ending."""
        raise NotImplementedError

    def list_samples(self, key: str) -> Sequence[str]:
        files = [self.find(key, f"{part}.bin", part) for part in self.parts()]
        sets = [parse_file(file, self._from_binary if file.endswith(".bin") else self._from_pickled) for file in files]
        counts = [len(planes) for planes, _ in sets]
        self.pixels = np.empty((sum(counts), 32, 32, 3), dtype=np.uint8)
        np.concatenate([planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for planes, _ in sets], out=self.pixels)
        self.labels = np.concatenate([labels for _, labels in sets]).astype(np.int64)
        self.class_names = self._names_of_classes(os.path.dirname(files[0]))
        return numbered(files, counts)

    def _from_binary(self, content: bytes) -> tuple[np.ndarray, np.ndarray]:
        record = self.label_bytes + 3072
        if len(content) % record:
            raise ValueError(f"its length is not a multiple of {record} bytes")
        rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
        return rows[:, self.label_bytes :], rows[:, self.label_bytes - 1]

    def _from_pickled(self, content: bytes) -> tuple[np.ndarray, np.ndarray]:
        table = cifar_pickle.read(content)
        pixels, labels = table["data"], table[self.label_key]
        is_known = isinstance(pixels, np.ndarray) and isinstance(labels, list)
        if not is_known or pixels.shape != (len(labels), 3072) or not all(isinstance(label, int) for label in labels):
            raise ValueError("it does not hold images of 3072 bytes with a label each")
        return pixels, np.array(labels)

    def _names_of_classes(self, folder: str) -> list[str] | None:
        text, pickled = (os.path.join(folder, name) for name in self.name_files)
        if exists(text):
            return read_lines(text)
        return list(parse_file(pickled, cifar_pickle.read)[self.name_key]) if exists(pickled) else None


class CIFAR10(Cifar):
    """CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32 x 32 pixels in 10 classes.

    The images are kept in memory (150 MB). They are read from `data_batch_1.bin`, ... (the binary version) or from
    `data_batch_1`, ... (the python version, whose pickles are read without being executed).

    Args:
        data_prefix: folder of these files, or the folder in which the archive was unpacked.
        split: part of the data set, "train" or "test".
    """

    folders = ("cifar-10-batches-bin", "cifar-10-batches-py")
    label_bytes = 1
    label_key = "labels"
    name_files = ("batches.meta.txt", "batches.meta")
    name_key = "label_names"

    def __init__(self, data_prefix: FilePath = "data/cifar10", split: Literal["train", "test"] = "train") -> None:
        super().__init__(data_prefix, split)
        self.nominal_size = {"train": 50_000, "test": 10_000}[split]

    def parts(self) -> list[str]:
        return [f"data_batch_{i}" for i in range(1, 6)] if self.split == "train" else ["test_batch"]


class CIFAR100(Cifar):
    """CIFAR-100 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32 x 32 pixels in 100 classes.

    The images are kept in memory (150 MB). They are read from `train.bin` and `test.bin` (the binary version) or from
    `train` and `test` (the python version, whose pickles are read without being executed). Labels are the 100 fine
    ones.

    Args:
        data_prefix: folder of these files, or the folder in which the archive was unpacked.
        split: part of the data set, "train" or "test".
    """

    folders = ("cifar-100-binary", "cifar-100-python")
    label_bytes = 2
    label_key = "fine_labels"
    name_files = ("fine_label_names.txt", "meta")
    name_key = "fine_label_names"

    def __init__(self, data_prefix: FilePath = "data/cifar100", split: Literal["train", "test"] = "train") -> None:
        super().__init__(data_prefix, split)
        self.nominal_size = {"train": 50_000, "test": 10_000}[split]

    def parts(self) -> list[str]:
        return [self.split]
