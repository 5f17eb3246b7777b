"""Image sizes and a cheap check for damage, made once per source and kept on disk.

Random crops are drawn before an image is decoded, so sizes must be known: Pillow reads them from the header. The same
visit looks at the file's end. A wrong end is only marked, because some programs write after the end marker.
"""

import hashlib
import logging
import os
import tempfile
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image

logger = logging.getLogger("sslrun")

_CHUNK = 512
_THREADS = 16
_VERSION = b"1"


class Indexed(Protocol):
    """What the index needs of a source; see `Source` for each of them."""

    is_decoded: bool

    def __len__(self) -> int: ...
    def fingerprint(self, ids: np.ndarray) -> bytes | None: ...
    def open_encoded(self, sample: int) -> IO[bytes]: ...
    def decoded(self, ids: np.ndarray, device: Any) -> Any: ...


@dataclass(frozen=True)
class Index:
    """Sizes and marks of N images, before any is decoded.

    Attributes:
        sizes: (N, 2) int32, height and width as stored (EXIF rotation not applied); 0, 0 for an unreadable header.
        suspicious: (N,) bool, whether the header is unreadable or a JPEG lacks its end marker; it may still decode.
    """

    sizes: np.ndarray
    suspicious: np.ndarray


def cache_dir() -> Path:
    """Folder of indexes and compiled code: `$SSLRUN_CACHE`, otherwise `sslrun` in the user's cache folder."""
    own = os.environ.get("SSLRUN_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sslrun"


def build_index(source: Indexed) -> Index:
    """The index of a source's samples, from the cache if the source's fingerprint is the same as then."""
    start = time.monotonic()
    parts = [np.arange(first, min(first + _CHUNK, len(source))) for first in range(0, len(source), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        prints = list(pool.map(source.fingerprint, parts))
        cache = _cache_file([one for one in prints if one is not None]) if None not in prints else None
        index = None if cache is None else _load(cache, len(source))
        if index is None:
            table = np.concatenate(list(pool.map(lambda ids: _visit_all(source, ids), parts)))
            index = Index(np.ascontiguousarray(table[:, :2]), table[:, 2].astype(bool))
            if cache is not None:
                _save(cache, index)
    elapsed_s = time.monotonic() - start
    if elapsed_s > 5:
        logger.info("sizes of %d images read in %.0f s", len(source), elapsed_s)
    return index


def _cache_file(prints: Sequence[bytes]) -> Path:
    digest = hashlib.blake2b(_VERSION, digest_size=16)
    for one in prints:
        digest.update(one)
    return cache_dir() / "index" / f"{digest.hexdigest()}.npz"


def _visit_all(source: Indexed, ids: np.ndarray) -> np.ndarray:
    """(n, 3) int32: height, width and whether the sample looks damaged."""
    if source.is_decoded:
        import torch

        return np.array([(*image.shape[:2], False) for image in source.decoded(ids, torch.device("cpu"))], np.int32)
    return np.array([visit(source, sample) for sample in ids.tolist()], np.int32)


def visit(source: Indexed, sample: int) -> tuple[int, int, bool]:
    """Height, width and whether a sample looks damaged; (0, 0, True) if nothing can be read."""
    try:
        with source.open_encoded(sample) as file:
            return header(file)
    except Exception:  # Pillow's plugins raise whatever a damaged header leads them to
        return 0, 0, True


def header(file: IO[bytes]) -> tuple[int, int, bool]:
    """As `visit`, of an open file. Raises what Pillow raises if nothing can be read."""
    with Image.open(file) as image:
        width, height = image.size
        kind = image.format
    if kind != "JPEG":
        return height, width, False
    file.seek(-2, os.SEEK_END)
    return height, width, file.read(2) != b"\xff\xd9"


def _load(cache: Path, count: int) -> Index | None:
    try:
        with np.load(cache) as arrays:
            index = Index(arrays["sizes"], arrays["suspicious"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return index if index.sizes.shape == (count, 2) and index.suspicious.shape == (count,) else None


def _save(cache: Path, index: Index) -> None:
    """Written to a temporary file and renamed. A cache that cannot be written only costs time at the next start."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache.parent, suffix=".tmp", delete=False) as file:
            np.savez(file, sizes=index.sizes, suspicious=index.suspicious)
        os.replace(file.name, cache)
    except OSError as error:
        logger.info("the index of image sizes is not kept: %s", error)
