"""What sources of image files share: a compact list of paths, reading, walking folders, annotation files."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, overload

import numpy as np

from sslrun.data import waiting
from sslrun.data.sources.base import Encoded, Source
from sslrun.errors import UsageError

# Without JPEG 2000: a damaged file of it may end the process that decodes it, and with it the run.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


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


class Paths(Names):
    """File paths below one folder, kept as one string of bytes: a million take their bytes and eight more each.

    Args:
        root: folder that relative paths start from; absolute paths ignore it.
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

    def name_at(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._blob[self._ends[i] : self._ends[i + 1]]))


class FileSource(Source, listed=False):
    """Base of sources whose samples are files of their own: a subclass lists their `Paths`, which are the names."""

    names: Paths

    @property
    def files_root(self) -> str:
        return self.names.root

    def encoded(self, ids: np.ndarray) -> Sequence[Encoded]:
        return [read_file(self.names[sample]) for sample in ids.tolist()]

    def open_encoded(self, sample: int) -> BinaryIO:
        return open(_open_regular(self.names[sample])[0], "rb")

    def fingerprint(self, ids: np.ndarray) -> bytes:
        """Names, lengths and times."""
        parts = []
        for path in (self.names[sample] for sample in ids.tolist()):
            waiting.note(path)
            try:
                status = os.stat(path)
                parts.append(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0")
            except (OSError, ValueError):  # a null byte in the name
                parts.append(f"{path}\0missing\0")
        return "".join(parts).encode(errors="surrogateescape")


class AnnotatedImages(FileSource, listed=False):
    """Base of sources whose images an annotation file lists, or otherwise class folders at any depth.

    Args:
        data_prefix: folder of the class folders, or of the images that `ann_file` names.
        ann_file: text file of lines `path label`. If it is not given, each folder that holds images is a class.
    """

    def __init__(self, data_prefix: str, ann_file: str | None = None) -> None:
        self.data_prefix = data_prefix
        self.ann_file = ann_file

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ann_file or self.data_prefix!r})"

    def list_samples(self, key: str) -> Paths:
        root = folder_of(self.data_prefix, key)
        if self.ann_file is not None:
            paths, self.labels = self.read_annotations(self.ann_file, root, key)
        else:
            paths, self.labels, self.class_names = in_leaf_folders(root)
        return paths

    def read_annotations(self, ann_file: str, root: str, key: str) -> tuple[Paths, np.ndarray | None]:
        """Paths and labels of the images that the annotation file lists."""
        return read_annotations(ann_file, root, key)


def read_file(path: str) -> bytes:
    """All bytes of a regular file, with few system calls: each of them waits for Python's lock once.

    Raises:
        OSError, ValueError: it cannot be read, or is a folder or a pipe; EAGAIN: it has less bytes than it should.
    """
    waiting.note(path)
    descriptor, size = _open_regular(path)
    try:
        content = os.read(descriptor, size)
        while len(content) < size and (more := os.read(descriptor, size - len(content))):  # some file systems
            content += more
        if len(content) < size:  # of a file that another machine is writing, for example
            raise OSError(errno.EAGAIN, "it became shorter while it was read", path)
        return content
    finally:
        os.close(descriptor)


def _open_regular(path: str) -> tuple[int, int]:
    """Descriptor and length of a file; a pipe is refused rather than waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        return descriptor, status.st_size
    os.close(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, "a folder, not a file", path)
    raise OSError(errno.ENXIO, "not a file", path)


@contextlib.contextmanager
def need(path: str, advice: str) -> Iterator[None]:
    """Turn the OSError of a file or folder into a UsageError with advice such as `set data.source.root to a folder`."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}: {advice}") from None


def folder_of(data_prefix: str, key: str) -> str:
    """The folder's absolute path, so that a later change of the working directory does no harm."""
    if not os.path.isdir(data_prefix):
        state = "is not a folder" if os.path.exists(data_prefix) else "does not exist"
        raise UsageError(f"{data_prefix} {state}: set {key}.data_prefix to the folder that holds the images")
    return os.path.abspath(data_prefix)


def entries(folder: str) -> tuple[list[str], list[str]]:
    """Sorted names of a folder's images and of its subfolders; hidden names and other files are passed over."""
    files, folders = [], []
    with os.scandir(folder) as scan:
        for entry in scan:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(EXTENSIONS):
                files.append(entry.name)
    return sorted(files), sorted(folders)


def walk(root: str, below: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Images below `root/below`, relative to `root`: a folder's own first, then its subfolders; no loops of links."""
    folder = os.path.join(root, below)
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    files, folders = entries(folder)
    for name in files:
        yield os.path.join(below, name)
    for name in folders:
        yield from walk(root, os.path.join(below, name), (*above, identity))


def in_class_folders(root: str, folders: Sequence[str]) -> tuple[Paths, np.ndarray]:
    """The images below each of some folders of `root`, in their order, and each image's number of its folder."""
    counts: list[int] = []

    def images() -> Iterator[str]:
        for name in folders:
            counts.append(0)
            for path in walk(root, name):
                counts[-1] += 1
                yield path

    paths = Paths(root, images())
    return paths, np.repeat(np.arange(len(counts)), counts)


def in_leaf_folders(root: str) -> tuple[Paths, np.ndarray, list[str]]:
    """Paths, labels and class names where each folder below `root` that holds images is a class, at any depth."""
    names: dict[str, int] = {}
    labels: list[int] = []

    def images() -> Iterator[str]:
        for path in walk(root):
            labels.append(names.setdefault(os.path.dirname(path), len(names)))
            yield path

    paths = Paths(root, images())
    return paths, np.array(labels, dtype=np.int64), list(names)


def images_below(root: str, data_prefix: str, key: str) -> tuple[Paths, np.ndarray | None, list[str] | None]:
    """Paths, labels and class names of a folder with one subfolder per class, or of a flat one without classes.

    Args:
        root: absolute path of the folder.
        data_prefix: how the config writes it.
        key: where the config names the source.

    Raises:
        UsageError: there are no images.
    """
    files, folders = entries(root)
    paths, labels = (Paths(root, walk(root)), None) if files else in_class_folders(root, folders)
    if len(paths) == 0:
        raise UsageError(
            f"{data_prefix} has no images ({', '.join(EXTENSIONS[:4])}, ...): "
            f"set {key}.data_prefix to a folder of images or of class folders"
        )
    return paths, labels, None if labels is None else folders


def read_annotations(ann_file: str, root: str, key: str) -> tuple[Paths, np.ndarray | None]:
    """Paths and labels of an annotation file. A path may hold spaces: only a last word that is a number is a label."""
    labels: list[int] = []
    unlabeled = 0

    def images() -> Iterator[str]:
        nonlocal unlabeled
        with open(ann_file, encoding="utf-8-sig", errors="surrogateescape") as lines:  # Notepad writes a BOM
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

    with need(ann_file, f"set {key}.ann_file to the file that lists the images"):
        paths = Paths(root, images())
    if len(paths) == 0:
        raise UsageError(f"{ann_file} lists no images: set {key}.ann_file to a file of lines `path` or `path label`")
    if labels and unlabeled:
        raise UsageError(f"{ann_file}: {unlabeled} of {len(paths)} lines have no label: label all of them or none")
    if labels and max(labels) >= 2**63:
        raise UsageError(f"{ann_file}: the label {max(labels)} is too large: labels are class numbers from 0")
    return paths, np.asarray(labels, dtype=np.int64) if labels else None
