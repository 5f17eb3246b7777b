"""The contract of a source: samples by id, with encoded bytes or decoded pixels, names, labels and sizes."""

import hashlib
import io
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from sslrun.config.component import Component
from sslrun.data import waiting
from sslrun.data.index import header, read_sizes
from sslrun.errors import UsageError
from sslrun.runtime.durable import is_outage, read_patiently

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("sslrun")

Encoded = bytes | np.ndarray
"""The content of one image file (JPEG, PNG, ...): bytes, or a one-dimensional uint8 array."""


class Source(Component, kind="sources"):
    """Base of all sources. Samples are numbered from 0 to N - 1; these ids must not depend on the machine.

    A subclass implements `list_samples` and either `encoded` or, with `is_decoded = True`, `decoded`. Its constructor
    opens no file, so that a run can be planned without data. Methods that take ids may be called from several threads
    at once.

    Attributes (after `open()`):
        names: what each sample is called in messages, logs and the list of bad samples: the path of a file, or
            `ARCHIVE#MEMBER`.
        labels: (N,) int64 class of each sample; None if there are no classes.
        class_names: name of each class; None if they are not known.
        remarks: what a user should know about the samples, a line each: files that are passed over, for example. They
            are logged when the source is opened, and shown by `data check`.
    """

    nominal_size: int | None = None
    """Number of samples, if it is known without the data."""

    is_decoded: bool = False
    """Whether samples are given as pixels by `decoded`. Otherwise they are given as image files by `encoded`."""

    channels: int = 3
    """Channels of the images: 3 for RGB, 1 for gray; any other number is read band by band (`has_bands`)."""

    lists_storage: bool = True
    """Whether `list_samples` only reads, so that it is left alone where storage hangs and the run is to stop."""

    names: Sequence[str]
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    remarks: Sequence[str] = ()
    _is_open: bool = False
    _sizes: np.ndarray | None = None

    def open(self, key: str = "data.source") -> None:
        """List the samples. A second call does nothing.

        Args:
            key: where the config names this source, for error messages.

        Raises:
            UsageError: there are no samples, or they cannot be listed; one line that names the key to change.
            RunFailed: the storage gives errors.
            Stopped: the run is asked to stop before they are listed.
        """
        if self._is_open:
            return

        def listed() -> Sequence[str]:
            return read_patiently(Path(key), lambda _: self._listed(key))

        names = waiting.patiently(listed) if self.lists_storage else listed()
        if len(names) == 0:
            raise UsageError(f"{self!r} has no samples: point {key} to some")
        self.names, self._is_open = names, True
        for remark in self.remarks:
            logger.info("%r: %s", self, remark)

    def make_nothing(self) -> None:
        """Keep `open` from making files, for a dry run: it lists what it would make. A source that contains another one
        passes this on."""

    def _listed(self, key: str) -> Sequence[str]:
        """Raises the OSErrors that may not last: a folder that may not be read now was pointed to by mistake."""
        try:
            with waiting.doing(repr(self), "is being listed"):
                return self.list_samples(key)
        except OSError as error:
            if may_pass(error):
                raise
            raise UsageError(f"{error.filename}: {error.strerror}: {key} cannot be read") from None

    def list_samples(self, key: str) -> Sequence[str]:
        """The names of all samples, in the order of their ids; sets `labels` and `class_names` if there are classes.

        Args:
            key: where the config names this source, for error messages.

        Raises:
            UsageError: one line.
            OSError: of a file that cannot be read.
        """
        raise NotImplementedError

    def encoded(self, ids: np.ndarray) -> Sequence[Encoded]:
        """The image files of some samples.

        Args:
            ids: (n,) int64.

        Raises:
            OSError, ValueError: a sample cannot be read; the message says why. Such a sample is replaced by another. An
                OSError that the storage or the network is to blame for (by its errno, a TimeoutError or a
                ConnectionError) is waited for, and says nothing about the sample.
        """
        raise NotImplementedError

    def decoded(self, ids: np.ndarray, device: "torch.device") -> "Sequence[np.ndarray] | np.ndarray | torch.Tensor":
        """The pixels of some samples, for a source with `is_decoded = True`.

        Args:
            ids: (n,) int64.
            device: where the pixels will be used. A source that keeps them there may return a tensor on it.

        Returns:
            n arrays (H, W, C), uint8, or one array (n, H, W, C); C is `channels`. They are copied if they are
            read-only or not contiguous.
        """
        raise NotImplementedError

    @property
    def has_bands(self) -> bool:
        """Whether `encoded` gives pixels, (H, W, C) uint8, in place of files: DALI decodes gray and RGB alone."""
        return not self.is_decoded and self.channels not in (1, 3)

    def size_in_header(self, file: BinaryIO) -> tuple[int, int]:
        """Height and width in the header of an open image file. Raises what its reader raises if there are none."""
        return np.load(file).shape[:2] if self.has_bands else header(file)

    def open_encoded(self, sample: int) -> BinaryIO:
        """A sample's image file, opened for reading and seeking; the sizes come from its first bytes.

        Raises:
            OSError, ValueError: as `encoded`.
        """
        (content,) = self.encoded(np.array([sample]))
        if not self.has_bands:
            return io.BytesIO(np.frombuffer(content, dtype=np.uint8).data)
        file = io.BytesIO()
        np.save(file, content)  # with the size in its head
        file.seek(0)
        return file

    def fingerprint(self, ids: np.ndarray) -> bytes | None:
        """Bytes that change when the content of any of these samples does, without reading it.

        For files: their names, lengths and times. Sizes are kept on disk under this fingerprint. With None, the
        default, they are read again at each start.
        """
        return None

    def identity(self) -> str:
        """A digest of the samples as far as they are known without reading them: names below their folder, image sizes
        and, for files, lengths. It is the same wherever the data lie. A resumed run compares it."""
        return digest_of([b"\0".join(os.fsencode(os.path.basename(name)) for name in self.names), self.sizes.tobytes()])

    def look_at_all(self) -> None:
        """Look at every file before the sizes are given next, so that each one that has changed is noticed.

        Called for a run that is resumed. A source whose sizes are always current does nothing.
        """

    @property
    def files_root(self) -> str | None:
        """Folder of the files, if each sample is a file that an annotation file can list; otherwise None."""
        return None

    @property
    def sizes(self) -> np.ndarray:
        """(N, 2) int32, height and width as stored (no EXIF rotation); 0, 0 if the header cannot be read, or could not
        be read then. They are read at first use."""
        if self._sizes is None:
            self._sizes = read_sizes(self)
        return self._sizes

    def sizes_of(self, ids: np.ndarray) -> np.ndarray:
        """(n, 2) int32, `sizes` of some samples, (n,) int64."""
        return self.sizes[ids]

    def labels_of(self, ids: np.ndarray) -> np.ndarray | None:
        """(n,) int64, `labels` of some samples, (n,) int64; None if there are no classes."""
        return None if self.labels is None else self.labels[ids]

    def has_size(self, sample: int) -> bool:
        """Whether the sample's size is known already, so that it could be read once."""
        return self._sizes is not None and bool(self._sizes[sample].min() > 0)

    def set_size(self, sample: int, size: tuple[int, int]) -> bool:
        """Enter height and width of a sample that could not be read when the sizes were; whether that is possible."""
        if self._sizes is not None:
            self._sizes[sample] = size
        return self.has_size(sample)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return type(self).__name__


def may_pass(error: OSError) -> bool:
    """Whether an error of listing samples is one to read again after, as `Source.open` does. A permission is the user's
    to give."""
    return is_outage(error) and not isinstance(error, PermissionError)


def digest_of(parts: Iterable[bytes | memoryview]) -> str:
    """A short digest of some bytes, for `identity`."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
