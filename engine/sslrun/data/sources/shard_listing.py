"""The samples of one tar shard, in the order of its members: where their images lie, and what labels them.

Consecutive members with the same name up to its first dot are one sample, as WebDataset has it: `n01/a.jpg`,
`n01/a.cls`, `n01/a.json`. Names are names only: nothing is ever opened by them.
"""

import json
import os
import tarfile
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, Any

from sslrun.config.paths import stated
from sslrun.data import waiting
from sslrun.data.sources.files import open_regular
from sslrun.data.sources.folders import EXTENSIONS
from sslrun.data.sources.shard_files import Shard, compressed, kind_of
from sslrun.errors import UsageError

_BLOCK = 512
_MOST_LABEL = 1 << 20  # bytes of a member with a label


@dataclass
class Listing:
    """The N samples of a shard.

    Attributes:
        names: the names of the images, one after the other.
        ends: (N,) where each of them ends.
        offsets: (N,) first byte of each image in the shard.
        lengths: (N,) bytes of each image.
        texts: number of each distinct label text.
        labels: (N,) numbers in `texts`; -1 for a sample without the label that was asked for.
        kinds: how many images have each extension, in lower case.
        without_image: how many samples have no image, by the extensions that they have.
        links: number of links, which are passed over.
    """

    names: bytearray = field(default_factory=bytearray)
    ends: array = field(default_factory=lambda: array("q"))
    offsets: array = field(default_factory=lambda: array("q"))
    lengths: array = field(default_factory=lambda: array("q"))
    texts: dict[str, int] = field(default_factory=dict)
    labels: array = field(default_factory=lambda: array("q"))
    kinds: Counter[str] = field(default_factory=Counter)
    without_image: Counter[str] = field(default_factory=Counter)
    links: int = 0


@dataclass(frozen=True)
class Wanted:
    """What is read of each sample.

    Attributes:
        image: extensions of the image, the first that a sample has; empty for any one image.
        label: extension of the member with the label; empty for none.
        path: keys that lead to the label within a JSON member; empty for the member's text.
        key: where the config names the source, for error messages.
    """

    image: tuple[str, ...]
    label: str
    path: tuple[str, ...]
    key: str


def list_shard(shard: Shard, wanted: Wanted) -> Listing:
    """Read the headers of a shard's members, and the labels.

    Raises:
        UsageError: the shard is compressed, cut short, damaged, or its samples are not clear; one line.
        OSError: it cannot be read.
    """
    waiting.note(shard.path, "is being listed")
    with open(open_regular(shard.path)[0], "rb") as file:
        if packed := kind_of(file.read(8)):
            raise UsageError(compressed(shard.path, packed[0], packed[1]))
        file.seek(0)
        try:
            # One encoding on all machines, which keeps names of any bytes.
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
                return _Reader(shard, file, archive, wanted).listing()
        except tarfile.TarError as error:
            raise UsageError(_damaged(shard, str(error))) from None
        except OSError as error:
            error.filename = error.filename or shard.path
            raise


def _damaged(shard: Shard, what: str) -> str:
    return f"{stated(shard.path, ' is damaged or cut short')}: {what}: copy it again, or leave it out"


class _Reader:
    def __init__(self, shard: Shard, file: IO[bytes], archive: tarfile.TarFile, wanted: Wanted) -> None:
        self._shard, self._file, self._archive, self._wanted = shard, file, archive, wanted
        self._found = Listing()
        self._key = ""
        self._members: dict[str, tarfile.TarInfo] = {}  # of the sample that is being read, by extension

    def listing(self) -> Listing:
        while (member := self._archive.next()) is not None:
            members: list[tarfile.TarInfo] = vars(self._archive)["members"]
            members.clear()  # of millions, none is kept
            if member.sparse is not None:
                raise UsageError(f"{self._shard.path} holds sparse files ({member.name}): pack it without them")
            if member.islnk() or member.issym():
                self._found.links += 1
            elif member.isreg():
                self._add(member)
        self._end_sample()
        self._check_end()
        return self._found

    def _add(self, member: tarfile.TarInfo) -> None:
        folder, base = os.path.split(member.name.removeprefix("./"))
        if base.startswith(".") or "__MACOSX" in folder.split("/"):  # what systems leave in archives
            return
        stem, _, extension = base.partition(".")
        key, extension = os.path.join(folder, stem), extension.lower()
        if key != self._key:
            self._end_sample()
            self._key = key
        if extension in self._members:
            raise UsageError(f"{self._shard.path} holds {member.name} twice in a row: pack it without copies")
        self._members[extension] = member

    def _end_sample(self) -> None:
        if not self._members:
            return
        found, members = self._found, self._members
        extension = self._image()
        self._members = {}
        if extension is None:
            found.without_image[", ".join(f".{each}" if each else "without a suffix" for each in sorted(members))] += 1
            return
        image = members[extension]
        found.names += image.name.removeprefix("./").encode("utf-8", "surrogateescape")
        found.ends.append(len(found.names))
        found.offsets.append(image.offset_data)
        found.lengths.append(image.size)
        found.kinds[extension.rpartition(".")[2]] += 1
        label = members.get(self._wanted.label) if self._wanted.label else None
        text = None if label is None else self._label(label)
        found.labels.append(-1 if text is None else found.texts.setdefault(text, len(found.texts)))

    def _image(self) -> str | None:
        """Extension of the image of a sample; None if it has none."""
        if self._wanted.image:
            return next((each for each in self._wanted.image if each in self._members), None)
        images = [each for each in self._members if f".{each.rpartition('.')[2]}" in EXTENSIONS]
        if len(images) > 1:
            names = " and ".join(self._members[each].name for each in images[:2])
            raise UsageError(
                f"{self._shard.path}: {names} are two images of one sample, since a name counts up to its first dot: "
                f'set {self._wanted.key}.image to the rest of the wanted one\'s name, such as "{images[0]}"'
            )
        return images[0] if images else None

    def _label(self, member: tarfile.TarInfo) -> str | None:
        if member.size > _MOST_LABEL:
            raise UsageError(f"{self._shard.path}#{member.name}: {member.size:,} bytes are no label")
        self._file.seek(member.offset_data)
        content = self._file.read(member.size)
        try:
            text = content.decode("utf-8").strip()
            if not self._wanted.path:
                return text or None
            value: Any = json.loads(text)
            for step in self._wanted.path:
                value = value.get(step) if isinstance(value, dict) else None
        except (ValueError, RecursionError):
            raise UsageError(f"{self._shard.path}#{member.name} is no label: it cannot be read") from None
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise UsageError(f"{self._shard.path}#{member.name}: a label is a number or a name, not {value!r:.40}")
        return str(value)

    def _check_end(self) -> None:
        """The end mark is there, and nothing after it: otherwise members have been passed over in silence."""
        end = self._archive.offset
        self._file.seek(end)
        mark = self._file.read(_BLOCK)
        if len(mark) < _BLOCK:
            raise UsageError(_damaged(self._shard, f"it has no end mark at byte {end:,}"))
        if any(mark):
            raise UsageError(_damaged(self._shard, f"byte {end:,} is no header of a member"))
        if any(self._file.read(64 * _BLOCK)):
            raise UsageError(
                f"{self._shard.path} has more after its end mark at byte {end:,}, so it is damaged, or archives were "
                "joined: unpack it and pack it again"
            )
