"""What sources of image files share: a compact list of paths, reading, and errors of one line."""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np

from sslrun.config.paths import stated
from sslrun.data import bands, waiting
from sslrun.data.index import header, read_sizes
from sslrun.data.levels import Range, in_8_bits, kind
from sslrun.data.sources import kept as kept_lists
from sslrun.data.sources.base import Encoded, Source, may_pass
from sslrun.data.sources.file_sizes import digest_of_files, file_sizes
from sslrun.data.sources.paths import Paths
from sslrun.errors import UsageError, printable

if TYPE_CHECKING:
    from sslrun.data.table import Table

_SUSPECTS = (".png", ".tif", ".tiff", ".ppm", ".pgm")
_LOOKED_AT = 50


class FileSource(Source, listed=False):
    """Base of sources whose samples are files of their own: a subclass lists their `Paths`, which are the names."""

    names: Paths

    range: Range = "auto"
    """How values beyond whole numbers from 0 to 255 are read; see `levels.in_8_bits`."""

    _digest: str | None = None
    """`identity`, if the sizes are kept with it."""

    _kept_sizes: "Table | None" = None
    """The table that holds the sizes; None: they are in memory only, or one was entered since."""

    _looks_at_all: bool = False
    _makes_files: bool = True

    @property
    def files_root(self) -> str:
        return self.names.root

    def _listed(self, key: str) -> Paths:
        listed = cast(Callable[[str], Paths], super()._listed)
        return kept_lists.listed(self, lambda: listed(key), self._makes_files)

    def make_nothing(self) -> None:
        self._makes_files = False

    def look_at_all(self) -> None:
        self._looks_at_all, self._sizes, self._digest, self._kept_sizes = True, None, None, None

    @property
    def sizes(self) -> np.ndarray:
        if self._sizes is None and self.names.kept is None:
            self._sizes = read_sizes(self)
        elif self._sizes is None:
            self._sizes, self._digest, self._kept_sizes = file_sizes(self, self._looks_at_all)
        return self._sizes

    def sizes_of(self, ids: np.ndarray) -> np.ndarray:
        sizes = self.sizes
        return sizes[ids] if self._kept_sizes is None else self._kept_sizes.rows("sizes", ids)

    def labels_of(self, ids: np.ndarray) -> np.ndarray | None:
        table = None if self.names.kept is None else self.names.kept.table
        if self.labels is None or table is None or self.labels is not table.columns.get("labels"):
            return super().labels_of(ids)
        return table.rows("labels", ids)

    def set_size(self, sample: int, size: tuple[int, int]) -> bool:
        self._digest = self._kept_sizes = None
        return super().set_size(sample, size)

    def encoded(self, ids: np.ndarray) -> Sequence[Encoded]:
        if self.has_bands:
            return [bands.pixels(read_file(self.names[i]), self.channels, self.range) for i in ids.tolist()]
        return [in_8_bits(read_file(self.names[sample]), self.range) for sample in ids.tolist()]

    def size_in_header(self, file: BinaryIO) -> tuple[int, int]:
        return bands.size(file) if self.has_bands else header(file)

    def open_encoded(self, sample: int) -> BinaryIO:
        return open(open_regular(self.names[sample])[0], "rb")

    def fingerprint(self, ids: np.ndarray) -> bytes:
        """Names, lengths and times."""
        parts = []
        for sample in ids.tolist():
            path = self.names[sample]
            waiting.note(path)
            try:
                status = os.stat(path)
                self.names.lengths[sample] = status.st_size
                parts.append(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0")
            except (OSError, ValueError):  # a null byte in the name
                parts.append(f"{path}\0missing\0")
        if self.has_bands:  # sizes that no other reader finds
            parts.append("bands")
        return "".join(parts).encode(errors="surrogateescape")

    def remarks_on_levels(self, paths: Paths) -> list[str]:
        """A remark if some of the files, of which a few are looked at, have other values than 0 to 255; another one if
        a TIFF file has more bands than are read.

        Raises:
            UsageError: TIFF files cannot be read band by band, or have another number of bands.
        """
        tiffs = paths.ending_with((".tif", ".tiff"))
        if self.has_bands:
            bands.require_reader(self.channels, has_tiff=len(tiffs) > 0)
        first = paths[tiffs[0]] if len(tiffs) else ""
        found = bands.count(first) if first else None
        if self.has_bands and found not in (None, self.channels):
            raise UsageError(f"{first} has {found} bands: set channels of the source, which is {self.channels}, to it")
        if self.has_bands:
            return []
        many = [] if found in (None, 1, 3, 4) else [f"{first} has {found} bands, which channels = {found} would read"]
        return [*many, *self._remarks_on_values(paths)]

    def _remarks_on_values(self, paths: Paths) -> list[str]:
        suspects = paths.ending_with(_SUSPECTS)
        for i in suspects[np.linspace(0, len(suspects) - 1, min(len(suspects), _LOOKED_AT)).astype(np.int64)].tolist():
            with contextlib.suppress(OSError, ValueError), open(open_regular(paths[i])[0], "rb") as file:
                if found := kind(file):
                    what = "floats" if found[0] == "float" else f"integers up to {found[1]}"
                    name = printable(os.path.relpath(paths[i], paths.root))
                    return [f"not all images have 8 bits ({name}: {what}): they are read by range = {self.range!r}"]
        return []

    def identity(self) -> str:
        sizes = self.sizes  # the lengths are found with them
        return self._digest or digest_of_files(self.names, self.names.lengths, sizes)


def read_file(path: str) -> bytes:
    """All bytes of a regular file, with few system calls: each of them waits for Python's lock once.

    Raises:
        OSError, ValueError: it cannot be read, or is a folder or a pipe; EAGAIN: it has less bytes than it should.
    """
    waiting.note(path)
    descriptor, size = open_regular(path)
    try:
        content = os.read(descriptor, size)
        while len(content) < size and (more := os.read(descriptor, size - len(content))):  # some file systems
            content += more
        if len(content) < size:  # of a file that another machine is writing, for example
            raise OSError(errno.EAGAIN, "it became shorter while it was read", path)
        return content
    finally:
        os.close(descriptor)


def open_regular(path: str) -> tuple[int, int]:
    """Descriptor and length of a file; a pipe is refused rather than waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        return descriptor, status.st_size
    os.close(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, "a folder, not a file", path)
    raise OSError(errno.ENXIO, "not a file", path)


def is_file(path: str) -> bool:
    """Whether there is a file; where `os.path.isfile` says no, storage that gives errors raises its OSError here."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: str) -> bool:
    """Whether there is a folder, as `is_file`."""
    return stat.S_ISDIR(_mode(path))


def exists(path: str) -> bool:
    """Whether there is something, as `is_file`."""
    return _mode(path) != 0


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except ValueError:  # a null byte in the name
        return 0
    except OSError as error:
        if may_pass(error):
            raise
        return 0


@contextlib.contextmanager
def need(path: str, advice: str) -> Iterator[None]:
    """Turn the OSError of a file that is read into a UsageError with advice such as `set data.source.ann_file to a
    list`; errors that may pass stay as they are."""
    try:
        yield
    except OSError as error:
        if may_pass(error):
            raise
        raise UsageError(f"{stated(path, f': {error.strerror or error}')}: {advice}") from None


def folder_of(data_prefix: str, key: str) -> str:
    """The folder's absolute path, so that a later change of the working directory does no harm."""
    if not is_folder(data_prefix):
        problem = stated(data_prefix, " is not a folder" if exists(data_prefix) else " does not exist")
        raise UsageError(f"{problem}: set {key}.data_prefix to the folder that holds the images")
    return os.path.abspath(data_prefix)
