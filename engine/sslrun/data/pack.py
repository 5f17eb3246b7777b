"""Packs the images of a source into tar shards, as the source `WebDataset` reads them: in the same order, byte by byte.

A shard is written beside its place and renamed when it is complete, so that a packing that was killed goes on after the
last complete one. The bytes depend on the images and the options alone.
"""

import fcntl
import hashlib
import io
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TypeVar

from PIL import Image

from sslrun.data import waiting
from sslrun.data.sources import Source
from sslrun.data.sources.folders import EXTENSIONS
from sslrun.data.sources.paths import Paths
from sslrun.data.sources.shard_files import OpenShards, Shard
from sslrun.data.sources.shard_index import MANIFEST, MANIFEST_KIND, UNFINISHED
from sslrun.data.sources.shard_listing import Listing, Wanted, list_shard
from sslrun.errors import RunFailed, UsageError
from sslrun.runtime.durable import read_patiently, replace_file, sync_directory

T = TypeVar("T")

_BLOCK = 512
_AHEAD = 4  # images that are read ahead, for each thread
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "PPM": ".ppm"}
_GRAY = ("1", "L", "LA", "La")
_AS_STORED = ("RGB", "L", "CMYK", "YCbCr")  # modes that Pillow shrinks while it decodes
_MODES = (*_GRAY, *_AS_STORED, "P", "PA", "RGBA", "RGBa", "RGBX")


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the shards, beside the images.

    Attributes:
        shard_size: bytes of a shard at most, unless one image is larger.
        max_side: longer side of the images at most, pixels; larger ones become JPEGs of it. None: all stay as they are.
        quality: of these JPEGs, 1 to 95.
    """

    shard_size: int
    max_side: int | None = None
    quality: int = 90


class Packing:
    """A folder of shards in the making: `write`, then `verify`, then `finish`. One process at a time holds the folder.

    Args:
        source: opened, of encoded images.
        folder: made if it does not exist; otherwise empty, or left by a packing of the same images and options.
        options: of the shards.
        workers: number of threads that read and encode.

    Attributes:
        done: number of samples in complete shards.
        is_finished: whether the folder was complete before.

    Raises:
        UsageError: the source or the folder cannot be taken; one line.
        RunFailed: the folder cannot be written to.
    """

    def __init__(self, source: Source, folder: Path, options: Options, workers: int) -> None:
        if source.is_decoded:
            raise UsageError(f"{source!r} keeps its images decoded: there are no files to pack")
        if source.has_bands and options.max_side is not None:
            raise UsageError(f"{source!r} has {source.channels} channels, which no JPEG holds: leave --max-side out")
        self.source, self.folder, self.options, self.workers = source, folder, options, workers
        self.names = Paths("", _without_repeats(_plain_names(source)))
        self.done, self.is_finished = 0, False
        self._counts: list[int] = []  # of samples, in each complete shard
        self._stack = ExitStack()
        try:
            self._enter()
        except OSError as error:
            raise self._unwritten(error.filename or folder, error) from None

    def __enter__(self) -> "Packing":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _enter(self) -> None:
        """Hold the folder, and find what it has."""
        digest = hashlib.blake2b(digest_size=16)
        for name in self.names:
            digest.update(os.fsencode(name) + b"\0")
        if self.source.labels is not None:
            digest.update(self.source.labels.tobytes())
        self._settings = {"names": digest.hexdigest(), "samples": len(self.names), **asdict(self.options)}
        unfinished, manifest = self.folder / UNFINISHED, self.folder / MANIFEST
        self.folder.mkdir(parents=True, exist_ok=True)
        if manifest.exists() and not unfinished.exists():
            if self._same(manifest, "settings"):
                self.done, self.is_finished = len(self.names), True
                return
            raise UsageError(f"{self.folder} has shards of other images or options: name an empty folder")
        if not unfinished.exists() and any(self.folder.iterdir()):
            raise UsageError(f"{self.folder} is not empty, and no packing was begun in it: name an empty folder")
        if not unfinished.exists():
            replace_file(unfinished, json.dumps({"settings": self._settings}).encode())
        if not self._same(unfinished, "settings"):
            raise UsageError(f"{self.folder} was begun with other images or options: name an empty folder")
        held = os.open(unfinished, os.O_RDONLY | os.O_CLOEXEC)
        self._stack.callback(os.close, held)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process packs into {self.folder}") from None
        except OSError:
            pass  # a file system without locks
        while self._path(len(self._counts)).exists():
            self._counts.append(len(self._listed(len(self._counts)).ends))
        self.done = sum(self._counts)
        if self.done > len(self.names):
            raise RunFailed(f"{self.folder} has {self.done:,} samples, and {self.source!r} {len(self.names):,}")

    def _same(self, file: Path, key: str) -> bool:
        try:
            return bool(json.loads(file.read_bytes())[key] == self._settings)
        except (ValueError, KeyError, TypeError):
            return False

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.tar"

    def _shard(self, number: int) -> Shard:
        status = os.stat(self._path(number))
        return Shard(os.path.abspath(self._path(number)), status.st_size, status.st_mtime_ns)

    def _listed(self, number: int) -> Listing:
        try:
            return list_shard(self._shard(number), Wanted((), "cls", (), "data.source"))
        except UsageError as error:
            raise RunFailed(f"{error}; remove it, and the same command makes it again") from None

    def write(self, progress: Callable[[int], object]) -> None:
        """Write the shards that are not there.

        Raises:
            RunFailed: an image cannot be read, or the disk is full; the same command goes on.
        """
        while (first := sum(self._counts)) < len(self.names):
            path = self._path(len(self._counts))
            if path.exists():  # behind one that was removed
                self._counts.append(len(self._listed(len(self._counts)).ends))
                progress(self._counts[-1])
                continue
            beside = path.with_suffix(".tar.tmp")
            try:
                with open(beside, "wb") as file:
                    self._counts.append(self._write(file, first, progress))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(beside, path)
                sync_directory(self.folder)
            except OSError as error:
                with suppress(OSError):
                    beside.unlink(missing_ok=True)
                raise self._unwritten(beside, error) from None

    def _write(self, file: IO[bytes], first: int, progress: Callable[[int], object]) -> int:
        """Write the shard that begins with a sample; how many it has."""
        count = 0
        with _archive(file) as archive, closing(self._ahead(self._packed, range(first, len(self.names)))) as packed:
            for sample in packed:
                if count and not self._fits(archive, sample):
                    break
                for name, content in sample:
                    archive.addfile(_member(name, len(content)), io.BytesIO(content))
                count += 1
                progress(1)
        return count

    def _fits(self, archive: tarfile.TarFile, sample: "_Sample") -> bool:
        headers = 5 * _BLOCK  # of a member with a long name
        whole = archive.offset + sum(_blocks(len(content)) + headers for _, content in sample)
        return whole + tarfile.RECORDSIZE <= self.options.shard_size  # with its end mark

    def verify(self, progress: Callable[[int], object]) -> int:
        """Read all samples back, and the images again: the same bytes, or a JPEG of the right size that decodes.

        Returns:
            the number of images that were made smaller.

        Raises:
            RunFailed: one line that names the shard to remove.
        """
        smaller, first = 0, 0
        for number, count in enumerate(self._counts):
            try:
                for was_smaller in self._verified(number, first):
                    smaller += was_smaller
                    progress(1)
            except ValueError as error:
                again = "remove it, and the same command makes it again"
                raise RunFailed(f"{self._path(number)} is not what was packed: {error}: {again}") from None
            first += count
        return smaller

    def _verified(self, number: int, first: int) -> Iterator[bool]:
        """Whether each image of a shard, whose first sample is `first`, was made smaller."""
        listing, files = self._listed(number), OpenShards([self._shard(number)])
        if len(listing.ends) != self._counts[number]:
            raise ValueError(f"{len(listing.ends):,} samples in place of {self._counts[number]:,}")
        texts = list(listing.texts)

        def is_smaller(row: int) -> bool:
            begin = listing.ends[row - 1] if row else 0
            name = os.fsdecode(bytes(listing.names[begin : listing.ends[row]]))
            label = texts[listing.labels[row]] if listing.labels[row] >= 0 else None
            return self._check(first + row, name, label, files.read(0, listing.offsets[row], listing.lengths[row]))

        return self._ahead(is_smaller, range(len(listing.ends)))

    def _check(self, sample: int, name: str, label: str | None, content: bytes) -> bool:
        """Whether an image was made smaller. Raises ValueError if the sample is not what it should be."""
        wanted, labels = self.names[sample], self.source.labels
        if os.path.splitext(name)[0] != os.path.splitext(wanted)[0]:
            raise ValueError(f"{name} is where {wanted} should be")
        if label != (None if labels is None else str(labels[sample])):
            raise ValueError(f"{name} has the label {label}")
        if content == self._read(sample):
            return False
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                is_right = image.format == "JPEG" and max(image.size) == self.options.max_side
        except Exception:  # Pillow's plugins raise whatever a damaged file leads them to
            is_right = False
        if not is_right:
            raise ValueError(f"{name} differs from {self.source.names[sample]}")
        return True

    def finish(self, smaller: int) -> None:
        """Write the manifest, by which the folder is complete."""
        manifest = {
            "kind": MANIFEST_KIND,
            "source": repr(self.source),
            "samples": len(self.names),
            "class_names": self.source.class_names,
            "made_smaller": smaller,
            "shards": [
                {"file": self._path(number).name, "samples": count, "bytes": self._shard(number).size}
                for number, count in enumerate(self._counts)
            ],
            "settings": self._settings,
        }
        try:
            replace_file(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())
            (self.folder / UNFINISHED).unlink()
            sync_directory(self.folder)
        except OSError as error:
            raise self._unwritten(error.filename or self.folder, error) from None

    def _unwritten(self, path: str | Path, error: OSError) -> RunFailed:
        return RunFailed(f"{path} could not be written: {error.strerror or error}: the same command goes on from there")

    def _read(self, sample: int) -> bytes:
        name = self.source.names[sample]
        waiting.note(name)

        def content(_: Path) -> bytes:
            with self.source.open_encoded(sample) as file:
                return file.read()

        try:
            return read_patiently(Path(name), content)
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise RunFailed(f"{name} cannot be read: {reason}: the same command goes on from there") from None

    def _packed(self, sample: int) -> "_Sample":
        """Names and contents of a sample's members."""
        content, name = self._read(sample), self.names[sample]
        stem, suffix = os.path.splitext(name)
        small = None if self.options.max_side is None else made_smaller(content, self.options)
        if small is not None:
            content, suffix = small, suffix if suffix.lower() in (".jpg", ".jpeg") else ".jpg"
        elif suffix.lower() not in EXTENSIONS:
            suffix = _suffix_of(content)
        labels = self.source.labels
        label = [] if labels is None else [(f"{stem}.cls", str(labels[sample]).encode())]
        return [(stem + suffix, content), *label]

    def _ahead(self, function: Callable[[int], T], numbers: Iterable[int]) -> Generator[T, None, None]:
        """Results in order; threads work some ahead."""
        threads, left = waiting.Threads(self.workers, "sslrun-pack"), iter(numbers)
        try:
            ahead = deque(threads.submit(function, number) for number in islice(left, _AHEAD * self.workers))
            wait = waiting.Wait()
            while ahead:
                result = waiting.result(ahead.popleft(), wait)
                wait.end()
                yield result
                ahead.extend(threads.submit(function, number) for number in islice(left, 1))
        finally:
            threads.close()


_Sample = list[tuple[str, bytes]]


def _archive(file: IO[bytes]) -> tarfile.TarFile:
    """A new archive; names of any bytes are kept as they are, on any machine."""
    return tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape")


def made_smaller(content: bytes, options: Options) -> bytes | None:
    """A JPEG whose longer side is `max_side`, without metadata; None for an image that is left as it is: small enough,
    with other values than 8 bits, of several frames, or one that cannot be decoded."""
    assert options.max_side is not None
    side = options.max_side
    try:
        with Image.open(io.BytesIO(content)) as opened:
            is_single = getattr(opened, "n_frames", 1) == 1
            if max(opened.size) <= side or opened.mode not in _MODES or not is_single:
                return None
            wanted = "L" if opened.mode in _GRAY else "RGB"
            image = opened if opened.mode in _AS_STORED else opened.convert(wanted)
            image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
            buffer = io.BytesIO()
            image.convert(wanted).save(buffer, "JPEG", quality=options.quality, exif=b"", icc_profile=None)
            return buffer.getvalue()
    except Exception:  # Pillow's plugins raise whatever a damaged file leads them to
        return None


def _suffix_of(content: bytes) -> str:
    """The usual suffix of an image's kind; .jpg if it has none that is read."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _SUFFIXES.get(image.format or "", ".jpg")
    except Exception:  # Pillow's plugins raise whatever a damaged header leads them to
        return ".jpg"


def _plain_names(source: Source) -> Iterator[str]:
    """A relative name for each sample: below the source's folder, or in its archive."""
    root = source.files_root
    for name in source.names:
        archive, _, member = name.rpartition("#")
        if member.isdecimal():  # of a Parquet file
            member = f"{os.path.splitext(os.path.basename(archive))[0]}-{int(member):08d}"
        below = os.path.relpath(name, root) if root is not None else member
        parts = [part for part in below.split(os.sep) if part not in ("", ".", "..")]
        yield "/".join(parts)


def _without_repeats(names: Iterable[str]) -> Iterator[str]:
    """Names whose part up to the first dot, by which WebDataset tells samples apart, differs from the one before."""
    before, wanted_before = "", ""
    for number, name in enumerate(names):
        folder, base = os.path.split(name)
        stem, suffix = os.path.splitext(base.lstrip("."))
        wanted = os.path.join(folder, stem.replace(".", "_") or "_")
        key = f"{wanted}-{number}" if wanted in (before, wanted_before) else wanted
        before, wanted_before = key, wanted
        yield key + suffix


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)  # of nobody, from 1970
    member.size = size
    return member


def _blocks(size: int) -> int:
    return (size + _BLOCK - 1) // _BLOCK * _BLOCK
