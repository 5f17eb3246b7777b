"""What sources of folders share: which files are images, which folders are classes, and what links lead to."""

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sslrun.config.paths import stated
from sslrun.data.sources.paths import Paths
from sslrun.data.sources.seen import Seen
from sslrun.errors import UsageError, printable

# Without JPEG 2000: a damaged file of it may end the process that decodes it, and with it the run.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif"),
    *(".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"),
)

# Files that nobody takes for images. All others that are passed over are counted.
_NO_IMAGES = {
    *(".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml", ".md", ".html", ".pdf", ".log"),
    *(".db", ".ini", ".py", ".sh", ".mat", ".npy", ".npz", ".pkl", ".h5", ".pt", ".pth"),
    *(".zip", ".tar", ".gz", ".tgz"),
}

# Folders that systems and archives leave among class folders.
_NO_CLASSES = {"__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}

_SHOWN = 3  # links in a remark


class Listing(NamedTuple):
    """The images of a folder.

    Attributes:
        paths: of N images.
        labels: (N,) int64, or None without classes.
        class_names: a name for each class, or None.
        remarks: what is unusual about the folder, a line each.
    """

    paths: Paths
    labels: np.ndarray | None
    class_names: list[str] | None
    remarks: list[str]


class Walk:
    """Lists images below a root. Links are followed, but no folder is entered twice.

    A link to a folder below the root is not followed, because its images are listed where they are; those of a folder
    elsewhere are listed at the first link to it.

    Args:
        root: absolute path.
        tops: the folders in the root that will be walked; None for all.

    Attributes:
        seen: the folders that were read, and the links that may lead to one.
    """

    def __init__(self, root: str, tops: Sequence[str] | None = None) -> None:
        self.root, self._real_root = root, os.path.realpath(root)
        self._tops = None if tops is None else set(tops)
        self._entered = {_identity(root)}
        self._kinds: Counter[str] = Counter()
        self.seen = Seen()
        self._skipped: list[str] = []

    def entries(self, below: str = "") -> tuple[list[str], list[str]]:
        """Sorted names of a folder's images and of its subfolders, without hidden ones; other files are counted."""
        files, folders = [], []
        folder = os.path.join(self.root, below)
        self.seen.read(folder)  # before it is read: what changes later is noticed
        with os.scandir(folder) as scan:
            for entry in scan:
                if _is_left_out(entry.name):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.lower().endswith(EXTENSIONS):
                    files.append(entry.name)
                else:
                    if entry.is_symlink():  # perhaps to a folder that is not there now
                        self.seen.linked(entry.path)
                    self._kinds[os.path.splitext(entry.name)[1].lower()] += 1
        return sorted(files), sorted(folders)

    def images(self, below: str = "") -> Iterator[str]:
        """Images below `root/below`, relative to the root: a folder's own first, then those of its subfolders."""
        if below and not self._enter(below):
            self.seen.linked(os.path.join(self.root, below))
            self._skipped.append(below)
            return
        files, folders = self.entries(below)
        for name in files:
            yield os.path.join(below, name)
        for name in folders:
            yield from self.images(os.path.join(below, name))

    @property
    def kinds(self) -> str:
        """How many files of which kinds are passed over, most frequent first; empty if there are none."""
        counts = [(kind, count) for kind, count in self._kinds.most_common() if kind not in _NO_IMAGES]
        return ", ".join(f"{count:,} {kind or 'without a suffix'}" for kind, count in counts)

    def remarks(self) -> list[str]:
        """What has been passed over, a line for each kind of thing."""
        remarks = []
        if self.kinds:
            remarks.append(f"files of kinds that are not read are passed over: {self.kinds}")
        if self._skipped:
            some = ", ".join(self._skipped[:_SHOWN]) + (", ..." if len(self._skipped) > _SHOWN else "")
            remarks.append(f"{len(self._skipped):,} linked folders are listed elsewhere, and not again: {some}")
        return list(map(printable, remarks))

    def _enter(self, below: str) -> bool:
        """Whether a folder is to be listed here; it is then remembered."""
        folder = os.path.join(self.root, below)
        identity = _identity(folder)
        if identity in self._entered or (os.path.islink(folder) and self._is_listed_elsewhere(folder)):
            return False
        self._entered.add(identity)
        return True

    def _is_listed_elsewhere(self, link: str) -> bool:
        real = os.path.realpath(link)
        if not real.startswith(os.path.join(self._real_root, "")):
            return False
        parts = os.path.relpath(real, self._real_root).split(os.sep)
        return not any(map(_is_left_out, parts)) and (self._tops is None or parts[0] in self._tops)


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name in _NO_CLASSES


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def in_class_folders(root: str, folders: Sequence[str]) -> Listing:
    """The images below each of some folders of `root`, which are the classes, numbered in this order."""
    return _in_classes(Walk(root, folders), folders)


def _found(walk: Walk, images: Iterator[str]) -> Paths:
    """The images of a walk, with a count of them on a terminal."""
    from sslrun.runtime.bar import WholeLine

    bar = WholeLine(images, "listing images", unit=" images", leave=False, dynamic_ncols=True, disable=None, delay=1)
    return Paths(walk.root, bar, walk.seen)


def _in_classes(walk: Walk, folders: Sequence[str]) -> Listing:
    counts: list[int] = []

    def images() -> Iterator[str]:
        for name in folders:
            counts.append(0)
            for path in walk.images(name):
                counts[-1] += 1
                yield path

    paths = _found(walk, images())
    return Listing(paths, np.repeat(np.arange(len(counts)), counts), list(folders), walk.remarks())


def in_leaf_folders(root: str) -> Listing:
    """Images where each folder below `root` that holds some is a class, at any depth."""
    names: dict[str, int] = {}
    labels = array("q")
    walk = Walk(root)

    def images() -> Iterator[str]:
        for path in walk.images():
            labels.append(names.setdefault(os.path.dirname(path), len(names)))
            yield path

    paths = _found(walk, images())
    return Listing(paths, np.frombuffer(labels, dtype=np.int64), list(names), walk.remarks())


def images_below(root: str, data_prefix: str, key: str) -> Listing:
    """Images of a folder with one subfolder per class, or of a flat one without classes.

    Args:
        root: absolute path of the folder.
        data_prefix: how the config writes it.
        key: where the config names the source.

    Raises:
        UsageError: there are no images.
    """
    walk = Walk(root)
    files, folders = walk.entries()
    if files:
        walk = Walk(root)
        paths = _found(walk, walk.images())
        stray = f"{len(folders):,} folders are no classes because of images beside them: {files[0]}"
        stray += f" and {len(files) - 1:,} more" if len(files) > 1 else ""
        return Listing(paths, None, None, [*([printable(stray)] if folders else []), *walk.remarks()])
    listing = _in_classes(walk, folders)
    if len(listing.paths) == 0:
        others = f", only {walk.kinds}" if walk.kinds else ""
        problem = stated(data_prefix, f" has no images ({', '.join(EXTENSIONS[:2])}, ...){others}")
        raise UsageError(f"{problem}: set {key}.data_prefix to a folder of images or of class folders")
    return listing
