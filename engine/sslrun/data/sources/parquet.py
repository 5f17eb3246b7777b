"""Images in Parquet files, as Hugging Face stores them."""

import contextlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from sslrun.config.paths import FilePath
from sslrun.data import waiting
from sslrun.data.arrow import pyarrow
from sslrun.data.levels import in_8_bits
from sslrun.data.sources.base import Encoded, Source, digest_of
from sslrun.data.sources.paths import Names
from sslrun.data.sources.shard_files import Shard, find_shards, refuse_remote
from sslrun.errors import UsageError

_KEPT = 2**30  # bytes of row groups that are kept in memory


class Parquet(Source):
    """Images in Parquet files as Hugging Face stores them: a column of structs with `bytes`, or of bytes, and a label.

    Such a file is read in groups of rows, as a rule 100 or 1000 images. Reading in order (`data check`, `data pack`,
    `embed`, evaluation) costs little. Training draws images from all places, and reads and unpacks a whole group for
    each of them: `sslrun data pack` makes shards, which `WebDataset` reads image by image. It needs pyarrow (`pip
    install 'sslrun[parquet]'`).

    Args:
        files: path of a .parquet file, of a folder of them, or a pattern such as
            `train-{00000..00293}-of-00294.parquet`.
        image: column of the images.
        label: column of the labels, numbers or names of classes; "none" for no labels. "auto" takes `label` if there is
            such a column.
    """

    def __init__(self, files: FilePath, image: str = "image", label: str = "auto") -> None:
        refuse_remote(files)
        self.files, self.image, self.label = files, image, label

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.files!r})"

    def list_samples(self, key: str) -> Sequence[str]:
        pyarrow()
        self._shards = find_shards(self.files, f"{key}.files", ".parquet")
        counts: list[int] = []
        places: list[tuple[int, int]] = []
        labels: list[Any] = []
        largest = 0
        self._is_struct, names = True, None
        for number, shard in enumerate(self._shards):
            with _reading(shard.path):
                file = self._opened(shard)
                column = self._column(file, shard, key)
                label = self._label_column(file, shard, key)
                feature = _features(file).get(label or "", {})
                if number == 0:
                    names = feature.get("names") if isinstance(feature, dict) else None
                for group in range(file.metadata.num_row_groups):
                    told_group = file.metadata.row_group(group)
                    counts.append(told_group.num_rows)
                    places.append((number, group))
                    largest = max(largest, told_group.column(column).total_compressed_size)
                if label is not None:
                    labels.append(file.read(columns=[label], use_threads=False).column(0).combine_chunks())
        self._firsts, self._places = np.cumsum([0, *counts]), places
        self._groups = _Groups(self._read_group)
        if labels:
            self._take_labels(labels, names, key)
        self.remarks = [
            f"images are read in {len(counts):,} groups of up to {max(counts, default=0):,}, {largest / 1e6:.0f} MB, "
            "which suits reading in order; before a training, `sslrun data pack` makes shards of them"
        ]
        return _RowNames(self._shards, self._firsts, np.array([file for file, _ in places], dtype=np.int64))

    def _opened(self, shard: Shard) -> Any:
        _, parquet = pyarrow()
        return parquet.ParquetFile(shard.path, pre_buffer=False)

    def _column(self, file: Any, shard: Shard, key: str) -> int:
        """Number of the column, among those that the file stores, that holds the bytes."""
        paths = [file.schema.column(number).path for number in range(len(file.schema))]
        for name, is_struct in ((f"{self.image}.bytes", True), (self.image, False)):
            if name in paths and file.schema.column(paths.index(name)).physical_type == "BYTE_ARRAY":
                self._is_struct = is_struct
                return paths.index(name)
        columns = ", ".join(file.schema_arrow.names)
        raise UsageError(f"{shard.path} has no images in {self.image}, but {columns}: set {key}.image to a column")

    def _label_column(self, file: Any, shard: Shard, key: str) -> str | None:
        names = file.schema_arrow.names
        if self.label == "none" or (self.label == "auto" and "label" not in names):
            return None
        label = "label" if self.label == "auto" else self.label
        if label not in names:
            raise UsageError(f"{shard.path} has no column {label}, but {', '.join(names)}: set {key}.label")
        return label

    def _take_labels(self, columns: list[Any], names: Any, key: str) -> None:
        arrow, _ = pyarrow()
        advice = f'set {key}.label to another column, or to "none"'
        missing = sum(column.null_count for column in columns)
        if missing:
            raise UsageError(f"{missing:,} rows have no label: {advice}")
        if all(arrow.types.is_integer(column.type) for column in columns):
            self.labels = np.concatenate([column.to_numpy().astype(np.int64) for column in columns])
            is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
            self.class_names = names if is_list and self.labels.max(initial=-1) < len(names) else None
            return
        if any(not (arrow.types.is_string(c.type) or arrow.types.is_large_string(c.type)) for c in columns):
            raise UsageError(f"labels are numbers or names, not {columns[0].type}: {advice}")
        texts = np.array([text for column in columns for text in column.to_pylist()], dtype=object)
        known, self.labels = np.unique(texts, return_inverse=True)
        self.class_names = known.tolist()

    def encoded(self, ids: np.ndarray) -> Sequence[Encoded]:
        contents: list[Encoded] = [b""] * len(ids)
        groups = np.searchsorted(self._firsts, ids, side="right") - 1
        for place in np.argsort(groups, kind="stable").tolist():  # each group once
            group, row = int(groups[place]), int(ids[place])
            value = self._groups.get(group)[row - int(self._firsts[group])].as_py()
            if value is None:
                raise ValueError("the row has no bytes")
            contents[place] = in_8_bits(value, "auto")
        return contents

    def _read_group(self, group: int) -> Any:
        """The bytes of a row group's images, as an arrow array."""
        number, place = self._places[group]
        shard = self._shards[number]
        waiting.note(shard.path)
        with _reading(shard.path, in_run=True):
            status = os.stat(shard.path)
            if (status.st_size, status.st_mtime_ns) != (shard.size, shard.time_ns):
                raise ValueError("the file has changed since it was listed")
            name = f"{self.image}.bytes" if self._is_struct else self.image
            column = self._opened(shard).read_row_group(place, columns=[name], use_threads=False).column(0)
            array = column.combine_chunks()
            return array.field("bytes") if self._is_struct else array

    def fingerprint(self, ids: np.ndarray) -> bytes:
        """The files and their times, and the numbers."""
        return json.dumps([self._shards, self.image]).encode() + np.ascontiguousarray(ids).tobytes()

    def identity(self) -> str:
        return digest_of([np.ascontiguousarray(self._firsts).tobytes(), self.sizes.tobytes()])


@contextlib.contextmanager
def _reading(path: str, in_run: bool = False) -> Iterator[None]:
    """Errors of pyarrow as those of a source: the path in an OSError, and one line for a damaged file."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), path) from None
        text = (str(error).splitlines() or [type(error).__name__])[0]
        if in_run:
            raise ValueError(text) from None
        raise UsageError(f"{path} is damaged, cut short, or no Parquet file: {text}") from None


def _features(file: Any) -> dict[str, Any]:
    """The types of the columns, as Hugging Face writes them beside the schema; empty if it did not."""
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


class _RowNames(Names):
    """`FILE#ROW` of each sample."""

    def __init__(self, shards: Sequence[Shard], firsts: np.ndarray, files: np.ndarray) -> None:
        self._shards, self._count = shards, int(firsts[-1])
        starts = np.searchsorted(files, np.arange(len(shards)))  # the first group of each file
        self._firsts = firsts[starts]

    def __len__(self) -> int:
        return self._count

    def name_at(self, i: int) -> str:
        number = int(np.searchsorted(self._firsts, i, side="right")) - 1
        return f"{self._shards[number].path}#{i - int(self._firsts[number])}"


class _Groups:
    """Row groups that were read last, for several threads; each is read by one of them."""

    def __init__(self, read: Any) -> None:
        self._read = read
        self._kept: OrderedDict[int, Future[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, group: int) -> Any:
        """A row group; what reading it raises, for all that wait for it."""
        with self._lock:
            known = self._kept.get(group)
            future: Future[Any] = Future() if known is None else known
            self._kept[group] = future
            self._kept.move_to_end(group)
        if known is not None:
            return known.result()
        try:
            array = self._read(group)
        except BaseException as error:
            with self._lock:
                self._kept.pop(group, None)
            future.set_exception(error)
            raise
        future.set_result(array)
        with self._lock:
            for old in list(self._over()):
                del self._kept[old]
        return array

    def _over(self) -> Iterator[int]:
        """The groups that were used longest ago and are too much; the last one is kept, however large it is."""
        total = 0
        for place, (group, future) in enumerate(reversed(self._kept.items())):
            if future.done():
                total += future.result().nbytes
                if total > _KEPT and place > 0:
                    yield group
