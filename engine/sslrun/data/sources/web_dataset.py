"""Images in tar shards, as WebDataset writes them."""

import io
from collections.abc import Sequence
from typing import BinaryIO, Literal

import numpy as np

from sslrun.config.paths import FilePath
from sslrun.data import bands
from sslrun.data.index import header
from sslrun.data.levels import checked, in_8_bits
from sslrun.data.sources.base import Encoded, Source, digest_of
from sslrun.data.sources.shard_files import OpenShards, find_shards, refuse_remote
from sslrun.data.sources.shard_index import MemberNames, ShardIndex, index_of
from sslrun.data.sources.shard_listing import Wanted
from sslrun.errors import UsageError


class WebDataset(Source):
    """Images in uncompressed tar files (shards) of the WebDataset layout, which `sslrun data pack` writes too.

    Every sample is read at its place in the shards, in the same order as from files: over all samples, not within a
    buffer of them. Consecutive members with the same name up to its first dot are one sample, such as `n01/a.jpg` and
    `n01/a.cls`. The shards are listed once; the index is kept on disk until the size or time of a shard changes.

    Args:
        shards: path of a .tar file, of a folder of them, or a pattern such as `train-{000000..000099}.tar`.
        image: extension of the image in each sample, such as "jpg"; several are separated by semicolons, of which the
            first that a sample has is read. "auto" takes the only image of each sample.
        label: extension of the member with the label, a number or the name of the class, such as "cls"; "json.KEY" for
            a key of the JSON member; "folder" for the folder in the name; "none" for no labels. "auto" takes `.cls`,
            and without it the folder.
        num_samples: number of samples, for a plan (`--dry-run`) made where the shards are not; elsewhere it is checked.
        range: how images with more than 8 bits (16-bit PNG and TIFF, float TIFF) are read: the values that become black
            and white, such as [0, 1023]. "auto" takes 0 to the smallest of 255, 4095 and 65535 (and of 1, for floats)
            that no value of the image exceeds; "full" the whole range of the type, 0 to 65535 or 0 to 1.
        channels: channels of the images. Color images are read as gray for 1. Other numbers are read as the bands of
            TIFF files, as many as the file has ('sslrun[tiff]' has the reader), or of PNG files with an alpha channel.
    """

    _index: ShardIndex
    _makes_files: bool = True

    def __init__(
        self,
        shards: FilePath,
        image: str = "auto",
        label: str = "auto",
        num_samples: int | None = None,
        range: Literal["auto", "full"] | list[float] = "auto",
        channels: int = 3,
    ) -> None:
        refuse_remote(shards)
        if channels < 1:
            raise UsageError(f"channels is {channels}, expected 1 or more")
        if label == "json":
            raise UsageError('label is "json", expected "json.KEY" with the key of the label')
        self.shards, self.image, self.label, self.nominal_size = shards, image, label, num_samples
        self.range, self.channels = checked(range), channels

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shards!r})"

    def make_nothing(self) -> None:
        self._makes_files = False

    def list_samples(self, key: str) -> Sequence[str]:
        shards = find_shards(self.shards, f"{key}.shards")
        images = () if self.image == "auto" else tuple(one.strip(". ").lower() for one in self.image.split(";"))
        extension, *path = {"auto": "cls", "folder": "", "none": ""}.get(self.label, self.label.lstrip(".")).split(".")
        self._index = index_of(shards, Wanted(images, extension, tuple(path), key), self.label, self._makes_files)
        count = len(self._index.offsets)
        if self.nominal_size not in (None, count):
            raise UsageError(f"{self!r} has {count:,} samples, and {key}.num_samples is {self.nominal_size:,}")
        if self.has_bands:
            bands.require_reader(self.channels, has_tiff=not {"tif", "tiff"}.isdisjoint(self._index.kinds))
        self.labels = self._index.labels if len(self._index.labels) else None
        self.class_names, self.remarks = self._index.class_names, self._index.remarks
        self._files = OpenShards(shards)
        return MemberNames(self._index, shards)

    def encoded(self, ids: np.ndarray) -> Sequence[Encoded]:
        contents = [self._files.read(*place) for place in self._places(ids)]
        if self.has_bands:
            return [bands.pixels(content, self.channels, self.range) for content in contents]
        return [in_8_bits(content, self.range) for content in contents]

    def _places(self, ids: np.ndarray) -> list[tuple[int, int, int]]:
        """Shard, first byte and length of some images."""
        index = self._index
        columns = index.shard(ids), index.offsets[ids], index.lengths[ids]
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def size_in_header(self, file: BinaryIO) -> tuple[int, int]:
        return bands.size(file) if self.has_bands else header(file)

    def open_encoded(self, sample: int) -> BinaryIO:
        return io.BufferedReader(_Member(self._files, *self._places(np.array([sample]))[0]))

    def fingerprint(self, ids: np.ndarray) -> bytes:
        """The shards and their times, and the numbers."""
        return f"{self._index.digest} {self.channels} ".encode() + np.ascontiguousarray(ids).tobytes()

    def identity(self) -> str:
        """Of the names within the shards: in other shards with the same samples, they are the same."""
        index = self._index
        parts = (index.names, index.ends, index.lengths, self.sizes)
        return digest_of(np.ascontiguousarray(part).tobytes() for part in parts)


class _Member(io.RawIOBase):
    """A part of a shard as a file of its own; what is read of it is read from the shard."""

    def __init__(self, files: OpenShards, shard: int, offset: int, size: int) -> None:
        self._files, self._shard, self._offset, self._size = files, shard, offset, size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError("a place before the file")
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._place))
        if count:
            buffer[:count] = self._files.read(self._shard, self._offset + self._place, count)
            self._place += count
        return count
