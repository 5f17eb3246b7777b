"""Files of vectors with the paths of their images: .npy, .npz and .parquet, written whole or not at all."""

import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from sslrun.data.arrow import pyarrow
from sslrun.errors import RunFailed, UsageError
from sslrun.runtime.durable import arriving, require_free

Rows = Iterable[np.ndarray]
"""(n, D) float32 each: the rows of a file, piece by piece."""


def paths_file(path: Path) -> Path:
    """The text file beside a .npy file: a path on each line, in the order of the rows."""
    return path.with_suffix(".paths.txt")


def check(path: Path, force: bool) -> None:
    """Raises UsageError, before any work is done, if vectors cannot be written to `path`."""
    if path.suffix not in _WRITERS:
        raise UsageError(f"{path}: the name of the file of vectors must end with {', '.join(_WRITERS)}")
    require_free(path, force)
    if path.suffix == ".parquet":
        pyarrow()


def write(path: Path, rows: Rows, shape: tuple[int, int], paths: Sequence[str]) -> None:
    """Writes vectors and paths; a reader sees the old file or the new one, never a part.

    Args:
        path: the file, whose suffix says in which form.
        rows: the vectors, N in all.
        shape: N and D.
        paths: N paths.

    Raises:
        RunFailed: the file could not be written.
    """
    try:
        if path.suffix == ".npy":
            with arriving(paths_file(path)) as beside:
                beside.write_bytes(b"".join(os.fsencode(_on_one_line(each)) + b"\n" for each in paths))
        with arriving(path) as beside:
            _WRITERS[path.suffix](beside, rows, shape, paths)
    except OSError as error:
        raise RunFailed(f"{path} could not be written: {error.strerror or error}") from error


def read(path: Path) -> np.ndarray:
    """(N, D) float32: the vectors of a file. Those of .npy stay on the disk until they are used."""
    if path.suffix == ".npy":
        vectors: np.ndarray = np.load(path, mmap_mode="r")
        return vectors
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            vectors = arrays["vectors"]
        return vectors
    _, parquet = pyarrow()
    column = parquet.read_table(path, columns=["vector"])["vector"].combine_chunks()
    return np.asarray(column.flatten()).reshape(len(column), column.type.list_size)


def _write_npy(path: Path, rows: Rows, shape: tuple[int, int], paths: Sequence[str]) -> None:
    with open(path, "wb") as file:
        _write_array(file, rows, shape)


def _write_npz(path: Path, rows: Rows, shape: tuple[int, int], paths: Sequence[str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("vectors.npy", "w", force_zip64=True) as file:
            _write_array(file, rows, shape)
        with archive.open("paths.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, np.array(list(paths)), allow_pickle=False)


def _write_array(file: IO[bytes], rows: Rows, shape: tuple[int, int]) -> None:
    """What `numpy.save` writes, from pieces."""
    header: Any = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for piece in rows:
        file.write(np.ascontiguousarray(piece, dtype="<f4").data)


def _write_parquet(path: Path, rows: Rows, shape: tuple[int, int], paths: Sequence[str]) -> None:
    arrow, parquet = pyarrow()
    schema = arrow.schema([("path", arrow.string()), ("vector", arrow.list_(arrow.float32(), shape[1]))])
    done = 0
    with parquet.ParquetWriter(path, schema) as file:
        for piece in rows:
            names = [_decodable(each) for each in paths[done : done + len(piece)]]
            vectors = arrow.FixedSizeListArray.from_arrays(arrow.array(piece.reshape(-1)), shape[1])
            file.write_table(arrow.table([arrow.array(names, arrow.string()), vectors], schema))
            done += len(piece)


def _on_one_line(path: str) -> str:
    return path.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") if {"\n", "\r"} & set(path) else path


def _decodable(path: str) -> str:
    """A path as UTF-8: bytes that are none are written as `\\udc..`."""
    return path.encode("utf-8", "backslashreplace").decode()


_WRITERS: dict[str, Callable[[Path, Rows, tuple[int, int], Sequence[str]], None]] = {
    ".npy": _write_npy,
    ".npz": _write_npz,
    ".parquet": _write_parquet,
}
