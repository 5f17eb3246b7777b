"""The index of tar shards: where each sample lies, what it is called and its label, made once and kept on disk.

The arrays are memory-mapped, so that the processes of a machine share them.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sslrun.data import waiting
from sslrun.data.index import cache_dir
from sslrun.data.sources.files import need
from sslrun.data.sources.paths import Names
from sslrun.data.sources.shard_files import Shard
from sslrun.data.sources.shard_listing import Listing, Wanted, list_shard
from sslrun.errors import UsageError, printable
from sslrun.runtime.durable import read_patiently

logger = logging.getLogger("sslrun")

MANIFEST = "manifest.json"
"""What `data pack` writes beside shards."""

MANIFEST_KIND = "sslrun-shards-1"
"""Value of its key `kind`."""

UNFINISHED = "packing.json"
"""What lies beside shards while `data pack` makes them."""

_VERSION = b"1"
_THREADS = 16
_ABOUT = "index.json"  # beside the arrays: what they hold, names of classes, remarks
_ARRAYS = ("offsets", "lengths", "firsts", "labels", "names", "ends")


@dataclass
class ShardIndex:
    """N samples in S shards.

    Attributes:
        offsets: (N,) int64, first byte of each image in its shard.
        lengths: (N,) int64, bytes of each image.
        firsts: (S + 1,) int64, number of each shard's first sample, and N.
        labels: (N,) int64; of length 0 without labels.
        names: uint8, the names of the images in their shards, one after the other.
        ends: (N + 1,) int64, where each name begins, and the end of the last one.
        class_names: a name for each class, or None.
        kinds: how many images have each extension.
        remarks: what is unusual, a line each.
        digest: of shards and options; another one where a shard has changed.
    """

    offsets: np.ndarray
    lengths: np.ndarray
    firsts: np.ndarray
    labels: np.ndarray
    names: np.ndarray
    ends: np.ndarray
    class_names: list[str] | None
    kinds: dict[str, int]
    remarks: list[str]
    digest: str = ""

    def member(self, sample: int) -> str:
        """Name of a sample's image in its shard."""
        return os.fsdecode(self.names[self.ends[sample] : self.ends[sample + 1]].tobytes())

    def shard(self, samples: np.ndarray) -> np.ndarray:
        """(n,) int64: numbers of the shards that hold some samples."""
        return np.searchsorted(self.firsts, samples, side="right") - 1


class MemberNames(Names):
    """`SHARD#MEMBER` of each sample."""

    def __init__(self, index: ShardIndex, shards: Sequence[Shard]) -> None:
        self._index, self._shards = index, shards

    def __len__(self) -> int:
        return len(self._index.offsets)

    def name_at(self, i: int) -> str:
        return f"{self._shards[int(self._index.shard(np.array(i)))].path}#{self._index.member(i)}"


def index_of(shards: Sequence[Shard], wanted: Wanted, label: str, keeps: bool = True) -> ShardIndex:
    """The index, from the cache if no shard has changed since it was made.

    While one process of a machine makes it, the others wait for it.

    Args:
        shards: in order.
        wanted: what is read of each sample.
        label: "auto", "none", "folder", or the member that must have it.
        keeps: whether a new index may be written to the cache.

    Raises:
        UsageError: a shard cannot be read as such, there are no samples, or not all have labels; one line.
        RunFailed: the storage gives errors.
    """
    if (unfinished := Path(shards[0].path).with_name(UNFINISHED)).exists():
        raise UsageError(
            f"{unfinished.parent} is not complete: give the command `sslrun data pack` again, which goes on"
        )
    manifest = _published(shards)
    classes = None if manifest is None else manifest.get("class_names")
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        classes = None
    if manifest is not None and label == "auto":
        label = ""  # as in the source that was packed: .cls or none, whatever folders the names have
    digest = hashlib.blake2b(_VERSION, digest_size=16)
    digest.update(json.dumps([shards, wanted.image, wanted.label, wanted.path, label, classes]).encode())
    folder = cache_dir() / "shards" / digest.hexdigest()
    index = _load(folder)
    if index is None:
        with _alone(folder) if keeps else contextlib.nullcontext():
            index = _load(folder)  # by another process meanwhile
            if index is None:
                begin = time.monotonic()
                index = _made(shards, wanted, label, classes)
                index.digest = folder.name
                if (elapsed_s := time.monotonic() - begin) > 5:
                    text = "%d images in %d shards were listed in %.0f s"
                    logger.info(text, len(index.offsets), len(shards), elapsed_s)
                index = _kept(index, folder) if keeps else index
    if manifest is not None:
        index.remarks += _left_out(manifest, shards)
    return index


def _left_out(manifest: dict[str, Any], shards: Sequence[Shard]) -> list[str]:
    """A remark if shards that were packed together are not read."""
    try:
        packed = [one["file"] for one in manifest["shards"]]
    except (KeyError, TypeError):
        return []
    missing = sorted(set(packed) - {os.path.basename(shard.path) for shard in shards})
    return [
        f"{len(missing):,} of {len(packed):,} shards of {MANIFEST} are not read: {name}, ..." for name in missing[:1]
    ]


def _published(shards: Sequence[Shard]) -> dict[str, Any] | None:
    """The manifest that `data pack` wrote: without it, names of classes that are numbered are not known."""
    try:
        content = json.loads(Path(shards[0].path).with_name(MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and content.get("kind") == MANIFEST_KIND else None


def _listings(shards: Sequence[Shard], wanted: Wanted) -> Iterator[Listing]:
    """Of all shards in order, some ahead: it is a network disk that takes time for each header."""

    def listed(shard: Shard) -> Listing:
        with need(shard.path, f"{wanted.key}.shards names it"):
            return read_patiently(Path(shard.path), lambda _: list_shard(shard, wanted))

    threads = waiting.Threads(_THREADS, "sslrun-shards")
    try:
        left = iter(shards)
        ahead = deque(threads.submit(listed, shard) for shard in itertools.islice(left, 2 * _THREADS))
        while ahead:
            yield waiting.result(ahead.popleft(), lambda: None)
            ahead.extend(threads.submit(listed, shard) for shard in itertools.islice(left, 1))
    finally:
        threads.close()


def _made(shards: Sequence[Shard], wanted: Wanted, label: str, classes: list[str] | None) -> ShardIndex:
    names, texts = bytearray(), dict[str, int]()
    offsets, lengths, ends, codes, firsts = (array("q") for _ in range(5))
    kinds, without_image, links = Counter[str](), Counter[str](), 0
    for found in _listings(shards, wanted):
        firsts.append(len(offsets))
        known = np.array([texts.setdefault(text, len(texts)) for text in found.texts] + [-1])
        codes.frombytes(known[np.frombuffer(found.labels, dtype=np.int64)].astype(np.int64).tobytes())
        ends.frombytes((np.frombuffer(found.ends, dtype=np.int64) + len(names)).tobytes())
        names += found.names
        offsets += found.offsets
        lengths += found.lengths
        kinds.update(found.kinds)
        without_image.update(found.without_image)
        links += found.links
    count = len(offsets)
    if count == 0:
        others = ", ".join(f"{n:,} {kind}" for kind, n in without_image.most_common(5))
        has = f"only {others}" if others else "nothing"
        what = f"no image .{' or .'.join(wanted.image)}" if wanted.image else "no images"
        raise UsageError(f"{shards[0].path} and all other shards have {what}, {has}: set {wanted.key}.shards or .image")
    remarks = []
    if without_image:
        some = ", ".join(f"{n:,} with {kind}" for kind, n in without_image.most_common(3))
        remarks.append(printable(f"{sum(without_image.values()):,} samples without an image are passed over: {some}"))
    if links:
        remarks.append(f"{links:,} links in shards are passed over")
    index = ShardIndex(
        np.frombuffer(offsets, dtype=np.int64),
        np.frombuffer(lengths, dtype=np.int64),
        np.array([*firsts, count], dtype=np.int64),
        np.empty(0, dtype=np.int64),
        np.frombuffer(names, dtype=np.uint8),
        np.concatenate([[0], np.frombuffer(ends, dtype=np.int64)]),
        None,
        dict(kinds),
        remarks,
    )
    unlabeled = codes.count(-1)
    if wanted.label and unlabeled < count:
        if unlabeled:
            first = index.member(codes.index(-1))
            raise UsageError(
                f"{unlabeled:,} of {count:,} samples have no label .{'.'.join((wanted.label, *wanted.path))}, such as "
                f'{first}: set {wanted.key}.label, to "none" for example'
            )
        _number(index, np.frombuffer(codes, dtype=np.int64), list(texts), classes, wanted.key)
    elif label not in ("auto", "none", "folder", ""):
        raise UsageError(f'no sample has a label .{label}: set {wanted.key}.label, to "none" for example')
    elif label not in ("none", ""):
        _take_folders(index, is_needed=label == "folder", key=wanted.key)
    return index


def _number(index: ShardIndex, codes: np.ndarray, texts: list[str], classes: list[str] | None, key: str) -> None:
    """Labels of the samples: the numbers that the texts are, or the places of the names in sorted order."""
    if all(text.removeprefix("-").isdecimal() and len(text.lstrip("-0")) <= 18 for text in texts):
        values = np.array([int(text) for text in texts], dtype=np.int64)
        if classes is not None and values.max() >= len(classes):
            raise UsageError(f"{key}: a label is {values.max()}, but {MANIFEST} names {len(classes)} classes")
        index.class_names = classes
    else:
        index.class_names = sorted(texts)
        values = np.argsort(np.argsort(np.array(texts, dtype=object), kind="stable"), kind="stable")
    index.labels = values[codes]


def _take_folders(index: ShardIndex, is_needed: bool, key: str) -> None:
    """Labels from the folders of the names, without those that all have in common; none if all are in one folder."""
    folders: dict[str, int] = {}
    codes = array("q")
    for sample in range(len(index.offsets)):
        codes.append(folders.setdefault(os.path.dirname(index.member(sample)), len(folders)))
    if len(folders) < 2 or "" in folders:
        if is_needed:
            raise UsageError(f"the names in the shards have no folders that tell classes: set {key}.label")
        return
    parts = [folder.split("/") for folder in folders]
    common = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False)))
    _number_by_name(index, np.frombuffer(codes, dtype=np.int64), ["/".join(part[common:]) for part in parts])


def _number_by_name(index: ShardIndex, codes: np.ndarray, names: list[str]) -> None:
    index.class_names = sorted(set(names))
    place = {name: number for number, name in enumerate(index.class_names)}
    index.labels = np.array([place[name] for name in names], dtype=np.int64)[codes]


def _load(folder: Path) -> ShardIndex | None:
    """A kept index, memory-mapped; None if there is none, or it is damaged."""
    try:
        about: dict[str, Any] = json.loads((folder / _ABOUT).read_bytes())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in _ARRAYS if name in about["arrays"]}
        arrays = {"labels": np.empty(0, dtype=np.int64), **arrays}
        if {name: len(values) for name, values in arrays.items() if len(values)} != about["arrays"]:
            return None
        return ShardIndex(
            **arrays,
            class_names=about["class_names"],
            kinds=about["kinds"],
            remarks=about["remarks"],
            digest=folder.name,
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _kept(index: ShardIndex, folder: Path) -> ShardIndex:
    """Write an index beside its place and rename it; what cannot be written only costs time at the next start."""
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    lengths = {name: len(values) for name, values in arrays.items() if len(values)}
    about = {
        "arrays": lengths,
        "class_names": index.class_names,
        "kinds": index.kinds,
        "remarks": index.remarks,
    }
    beside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, suffix=".tmp"))
        for name in lengths:
            np.save(beside / f"{name}.npy", arrays[name])
        (beside / _ABOUT).write_text(json.dumps(about))
        if _load(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        os.replace(beside, folder)
    except OSError as error:
        logger.info("the index of the shards is not kept: %s", error)
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
    return _load(folder) or index


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from making the same index, where the file system can."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder.with_suffix(".lock"), "ab"))
            with waiting.doing(str(folder), "is being made by another process"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
