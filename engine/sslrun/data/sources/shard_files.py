"""Tar shards as files: which ones a path or a pattern names, and reading parts of them."""

import itertools
import math
import os
import re
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from sslrun.config.paths import stated
from sslrun.data import waiting
from sslrun.data.sources.files import is_file, is_folder, open_regular
from sslrun.errors import UsageError

_REMOTE = re.compile(r"(?:^|/)((?:s3|gs|gcs|az|abfss?|hf|https?|ftp|hdfs|webhdfs|ais|oss|file):/|pipe:)", re.IGNORECASE)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 1_000_000  # shards of a pattern
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
}
_COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tar.lz4")
_OPEN = 1024  # shards that stay open at most


class Shard(NamedTuple):
    """A tar file, and what tells that it has changed.

    Attributes:
        path: absolute.
        size: bytes.
        time_ns: of its last change.
    """

    path: str
    size: int
    time_ns: int


def refuse_remote(shards: str) -> None:
    """Raises UsageError for addresses and commands in place of a path."""
    if found := _REMOTE.search(shards):
        address = re.sub(r":/(?=[^/])", "://", shards[found.start(1) :], count=1)
        raise UsageError(
            f"{address}: images are read at any place of their files, from disks alone: copy the files to a disk that "
            "all ranks see, or mount the bucket, and name the folder"
        )


def find_shards(shards: str, key: str, suffix: str = ".tar") -> list[Shard]:
    """The shards in order: those of a folder by name, those of a pattern as the shell would expand it.

    Args:
        shards: path of a .tar file, of a folder of them, or a pattern such as `train-{000000..000099}.tar`.
        key: where the config names it, for error messages.
        suffix: of the files that are looked for in a folder.

    Raises:
        UsageError: there are none, or not all; one line.
        OSError: of storage that gives errors.
    """
    advice = f"set {key} to a {suffix} file, a folder of them, or a pattern such as train-{{000000..000099}}{suffix}"
    if is_folder(shards):
        names = sorted(os.listdir(shards))
        paths = [os.path.join(shards, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
        packed = [name for name in names if name.lower().endswith(_COMPRESSED_SUFFIXES)]
        if not paths and packed and suffix == ".tar":
            raise UsageError(compressed(os.path.join(shards, packed[0]), "gzip", "gunzip -k"))
        if not paths:
            raise UsageError(f"{stated(shards, f' has no {suffix} files')}: {advice}")
    else:
        paths = [shards] if is_file(shards) else expanded(shards)
    found = []
    for path in map(os.path.abspath, paths):
        if not is_file(path):
            which = "" if len(paths) == 1 else f" ({len(paths):,} shards are named)"
            raise UsageError(f"{stated(path, ' does not exist')}{which}: {advice}")
        waiting.note(path, "is being looked at")
        status = os.stat(path)
        found.append(Shard(path, status.st_size, status.st_mtime_ns))
    return found


def expanded(pattern: str) -> list[str]:
    """The paths that a pattern with braces names, in the shell's order: `{000..099}` counts, `{a,b}` lists; both may
    occur several times. Other braces stay."""
    parts: list[Sequence[str]] = []
    for place, text in enumerate(_BRACES.split(pattern)):
        parts.append([text] if place % 2 == 0 else _alternatives(text))
    count = math.prod(map(len, parts))
    if count > _MOST:
        raise UsageError(f"{pattern} names {count:,} shards, more than {_MOST:,}")
    return ["".join(choice) for choice in itertools.product(*parts)]


def _alternatives(text: str) -> Sequence[str]:
    if match := _RANGE.fullmatch(text):
        first, last = int(match[1]), int(match[2])
        if abs(last - first) > _MOST:
            raise UsageError(f"{{{text}}} names more than {_MOST:,} shards")
        is_padded = len(match[1]) == len(match[2]) or match[1].startswith("0")
        width = max(len(match[1]), len(match[2])) if is_padded else 0
        step = 1 if last >= first else -1
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    return text.split(",") if "," in text else ["{" + text + "}"]


def compressed(path: str, kind: str, command: str) -> str:
    """What to tell of a compressed archive."""
    return f"{path} is compressed ({kind}), so its images cannot be read one by one: unpack it ({command}) to a .tar"


def kind_of(start: bytes) -> tuple[str, str] | None:
    """The compression that the first bytes of a file tell, and the command that undoes it; None if it is not packed."""
    return next((found for magic, found in _COMPRESSED.items() if start.startswith(magic)), None)


class OpenShards:
    """Reads parts of shards, from several threads at once.

    Files stay open, since opening one is what costs time on a cluster's file system; the one that has not been read for
    longest is closed where there are too many. One that gave an error is opened again, since its handle may be stale.

    Args:
        shards: as they were when they were listed; another file in the place of one is refused.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()
        self._most = max(8, min(_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Some bytes of a shard.

        Raises:
            OSError: with the path of the shard.
            ValueError: the shard is not the file that was listed.
        """
        path = self._shards[shard].path
        waiting.note(path)
        descriptor = self._descriptor(shard)
        try:
            content = os.pread(descriptor.number, size, offset)
            while len(content) < size and (
                more := os.pread(descriptor.number, size - len(content), offset + len(content))
            ):
                content += more
        except OSError as error:
            self._forget(shard, descriptor)
            raise OSError(error.errno, error.strerror, path) from None
        if len(content) < size:
            self._forget(shard, descriptor)
            raise ValueError("the shard has become shorter since it was listed")
        return content

    def _descriptor(self, shard: int) -> "_Descriptor":
        with self._lock:
            if (known := self._open.get(shard)) is not None:
                self._open.move_to_end(shard)
                return known
        opened = _Descriptor(self._shards[shard])  # without the lock: this may hang
        with self._lock:
            self._open[shard] = opened
            while len(self._open) > self._most:
                self._open.popitem(last=False)
        return opened

    def _forget(self, shard: int, descriptor: "_Descriptor") -> None:
        with self._lock:
            if self._open.get(shard) is descriptor:
                del self._open[shard]


class _Descriptor:
    """An open file; it is closed when nobody holds it any more, so never under a thread that reads."""

    def __init__(self, shard: Shard) -> None:
        self.number = -1
        self.number, size = open_regular(shard.path)
        if (size, os.fstat(self.number).st_mtime_ns) != (shard.size, shard.time_ns):
            raise ValueError("the shard has changed since it was listed")

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)
