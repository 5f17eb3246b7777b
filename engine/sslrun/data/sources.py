"""Which samples exist: image files on disk, their labels, their sizes.

A constructor touches no file, so that a plan can be made without data; `open()` lists the samples and says in one line
what is missing. A million paths cost their bytes and eight more each.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import torch

from sslrun.config.component import Component
from sslrun.data.index import Index, build_index
from sslrun.errors import UsageError
from sslrun.randomness import HOLDOUT_VIEW, uniforms

# Without JPEG 2000: a damaged file of it may end the process that decodes it, and with it the run.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


class Paths(Sequence[str]):
    """File paths below one folder, kept as one string of bytes.

    Args:
        root: folder that relative paths start from; absolute ones stand for themselves.
        relative: the paths, consumed once.
    """

    def __init__(self, root: str, relative: Iterable[str]) -> None:
        self.root = root
        blob, ends = bytearray(), [0]
        for path in relative:
            blob += os.fsencode(path)
            ends.append(len(blob))
        self._blob, self._ends = bytes(blob), np.asarray(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i = int(i) % len(self)
        return os.path.join(self.root, os.fsdecode(self._blob[self._ends[i] : self._ends[i + 1]]))


class Source(Component, kind="sources"):
    """Base of all sources. A subclass lists its samples in `_list()`, sorted so that ids never depend on the machine.

    After `open()`: `len(source)`, `paths`, `labels` ((N,) int64 or None), `class_names` (or None). The image sizes
    are read at first use and cached on disk.
    """

    nominal_size: int | None = None
    """Number of samples where it is known without the data."""

    in_memory: bool = False
    """Whether `images` has them all, decoded; otherwise they are files that `paths` names."""

    paths: Sequence[str]
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    _index: Index | None = None

    def open(self, key: str = "data.source") -> None:
        """List the samples; once is enough, again is free.

        Args:
            key: where the config names this source, for the error's advice.

        Raises:
            UsageError: nothing there, or nothing in it; one line that says how to point to it.
        """
        if hasattr(self, "paths"):
            return
        try:
            paths = self._list(key)
        except OSError as error:
            raise UsageError(f"{error.filename}: {error.strerror}: {key} cannot be read") from None
        if len(paths) == 0:
            raise UsageError(f"{self!r} has no samples: point {key} to some")
        self.paths = paths

    def _list(self, key: str) -> Sequence[str]:
        """The samples' files in their fixed order; sets `labels` and `class_names` where there are any."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return type(self).__name__

    def images(self, ids: np.ndarray, device: torch.device) -> np.ndarray | torch.Tensor:
        """Decoded images of a source that keeps them: (B, H, W, 3) uint8 RGB, a copy; on a GPU a tensor there."""
        raise NotImplementedError

    @property
    def index(self) -> Index:
        """Sizes and marks of the files; made at first use: a minute for a million local files, then seconds."""
        if self._index is None:
            self._index = build_index(self.paths)
        return self._index

    @property
    def sizes(self) -> np.ndarray:
        """(N, 2) int32, height and width as stored (no EXIF rotation); 0, 0 where the header cannot be read."""
        return self.index.sizes

    @property
    def suspicious(self) -> np.ndarray:
        """(N,) bool: header unreadable, or the file does not end as its format does."""
        return self.index.suspicious


class ImageFolder(Source):
    """A folder of images: one subfolder per class, or no classes at all.

    Images directly in the folder make it unlabeled, and everything below it is one flat set. Otherwise each
    subfolder is a class (an empty one too), numbered in sorted order, with all images below it. Links are followed;
    hidden names and files without an image's extension are passed over.

    Args:
        data_prefix: the folder; relative paths start from the working directory.
    """

    def __init__(self, data_prefix: str) -> None:
        self.data_prefix = data_prefix

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data_prefix!r})"

    def _list(self, key: str) -> Sequence[str]:
        root = folder_of(self.data_prefix, key)
        files, folders = _entries(root)
        paths, labels = (Paths(root, walk(root)), None) if files else in_class_folders(root, folders)
        if len(paths) == 0:
            raise UsageError(
                f"{self.data_prefix} has no images ({', '.join(EXTENSIONS[:4])}, ...): "
                f"set {key}.data_prefix to a folder of images or of class folders"
            )
        if labels is not None:
            self.class_names, self.labels = folders, labels
        return paths


class ImageList(Source):
    """Images named by a text file: a line is `path`, or `path label` with a number. All lines have a label or none.

    Args:
        data_prefix: folder that relative paths start from.
        ann_file: the text file.
    """

    def __init__(self, data_prefix: str, ann_file: str) -> None:
        self.data_prefix = data_prefix
        self.ann_file = ann_file

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ann_file!r})"

    def _list(self, key: str) -> Sequence[str]:
        root = folder_of(self.data_prefix, key)
        paths, self.labels = read_annotations(self.ann_file, root, key)
        return paths


class ImageNet(Source):
    """ImageNet-1k training or validation images, about 1.28 M in 1000 classes.

    Args:
        data_prefix: folder of the class folders (`n01440764`, ...), or of the images that `ann_file` names.
        ann_file: lines `n01440764/n01440764_10026.JPEG 0`; where it does not exist or is not given, the classes come
            from the folders, which gives the same labels.
    """

    nominal_size = 1_281_167

    def __init__(self, data_prefix: str, ann_file: str | None = None) -> None:
        self.data_prefix = data_prefix
        self.ann_file = ann_file

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data_prefix!r})"

    def _list(self, key: str) -> Sequence[str]:
        root = folder_of(self.data_prefix, key)
        if self.ann_file is not None and os.path.exists(self.ann_file):
            paths, self.labels = read_annotations(self.ann_file, root, key)
            return paths
        folder = ImageFolder(root)
        folder.open(key)
        self.labels, self.class_names = folder.labels, folder.class_names
        return folder.paths


class Subset(Source, listed=False):
    """Some samples of an opened source, numbered anew from 0 in the given order. Made by the engine, not by a config.

    Args:
        source: opened.
        ids: (n,) int64, sample ids in the source.
    """

    def __init__(self, source: Source, ids: np.ndarray) -> None:
        self.source = source
        self.ids = np.asarray(ids, dtype=np.int64)
        self.labels = None if source.labels is None else source.labels[self.ids]
        self.class_names = source.class_names
        self.in_memory = source.in_memory
        self.paths = _Picked(source.paths, self.ids)

    def __repr__(self) -> str:
        return f"{len(self)} of {self.source!r}"

    def images(self, ids: np.ndarray, device: torch.device) -> np.ndarray | torch.Tensor:
        return self.source.images(self.ids[ids], device)

    @property
    def index(self) -> Index:
        """The source's index, restricted."""
        if self._index is None:
            index = self.source.index
            self._index = Index(index.sizes[self.ids], index.suspicious[self.ids])
        return self._index


def split_holdout(source: Source, fraction: float) -> tuple[Subset, Subset]:
    """Keep some samples out of training: those whose ids have the smallest hashes, the same in every run.

    Args:
        source: opened.
        fraction: of the samples to keep out, in (0, 1); at least one sample, and one is left.

    Returns:
        training and held-out samples, each in the source's order.
    """
    if not 0 < fraction < 1 or len(source) < 2:
        raise UsageError(f"data.holdout = {fraction} cannot split {len(source)} samples: give a fraction in (0, 1)")
    count = min(max(round(fraction * len(source)), 1), len(source) - 1)
    hashes = uniforms(0, 0, np.arange(len(source)), HOLDOUT_VIEW, 2)
    kept_out = np.zeros(len(source), dtype=bool)
    kept_out[np.lexsort((hashes[:, 1], hashes[:, 0]))[:count]] = True
    return Subset(source, np.flatnonzero(~kept_out)), Subset(source, np.flatnonzero(kept_out))


class _Picked(Sequence[str]):
    """Paths of a subset, looked up in the source's."""

    def __init__(self, paths: Sequence[str], ids: np.ndarray) -> None:
        self._paths, self._ids = paths, ids

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self._paths[k] for k in self._ids[i]]
        return self._paths[self._ids[i]]


def folder_of(data_prefix: str, key: str) -> str:
    """The folder's absolute path, so that a later change of the working directory does no harm."""
    if not os.path.isdir(data_prefix):
        state = "is not a folder" if os.path.exists(data_prefix) else "does not exist"
        raise UsageError(f"{data_prefix} {state}: set {key}.data_prefix to the folder that holds the images")
    return os.path.abspath(data_prefix)


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """Sorted names of a folder's images and of its subfolders."""
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(EXTENSIONS):
                files.append(entry.name)
    return sorted(files), sorted(folders)


def in_class_folders(root: str, folders: Sequence[str]) -> tuple[Paths, np.ndarray]:
    """The images below each of some folders of `root`, in their order, and the numbers of their folders."""
    counts: list[int] = []

    def listed() -> Iterator[str]:
        for name in folders:
            counts.append(0)
            for path in walk(root, name):
                counts[-1] += 1
                yield path

    paths = Paths(root, listed())
    return paths, np.repeat(np.arange(len(counts)), counts)


def walk(root: str, below: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Images below `root/below`, relative to `root`: a folder's own first, then its subfolders; no loops of links."""
    folder = os.path.join(root, below)
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    files, folders = _entries(folder)
    for name in files:
        yield os.path.join(below, name)
    for name in folders:
        yield from walk(root, os.path.join(below, name), (*above, identity))


def read_annotations(ann_file: str, root: str, key: str) -> tuple[Paths, np.ndarray | None]:
    """Paths and labels of an annotation file. A path may hold spaces: only a last word that is a number is a label."""
    labels: list[int] = []
    unlabeled = 0

    def listed() -> Iterator[str]:
        nonlocal unlabeled
        with open(ann_file, encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                line = line.rstrip("\r\n")
                if not line.strip():
                    continue
                path, _, label = line.rpartition(" ")
                if path and label.isdecimal():
                    labels.append(int(label))
                    yield path
                else:
                    unlabeled += 1
                    yield line

    try:
        paths = Paths(root, listed())
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"{ann_file}: {reason}: set {key}.ann_file to the file that lists the images") from None
    if len(paths) == 0:
        raise UsageError(f"{ann_file} lists no images: set {key}.ann_file to a file of lines `path` or `path label`")
    if labels and unlabeled:
        raise UsageError(f"{ann_file}: {unlabeled} of {len(paths)} lines have no label: label all of them or none")
    return paths, np.asarray(labels, dtype=np.int64) if labels else None
