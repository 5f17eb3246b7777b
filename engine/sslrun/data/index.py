"""Image sizes, read once per source and kept on disk.

Random crops are drawn before an image is decoded, so sizes must be known: Pillow reads them from the headers.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from sslrun.data.sources.base import Source

logger = logging.getLogger("sslrun")

_CHUNK = 512
_THREADS = 16
_VERSION = b"2"


def cache_dir() -> Path:
    """Folder of indexes and compiled code: `$SSLRUN_CACHE`, otherwise `sslrun` in the user's cache folder."""
    own = os.environ.get("SSLRUN_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sslrun"


def read_sizes(source: Source) -> np.ndarray:
    """Sizes of a source's N images, from the cache if the source's fingerprint is the same as then.

    Returns:
        (N, 2) int32, height and width as stored (EXIF rotation not applied); 0, 0 for an unreadable header.
    """
    start = time.monotonic()
    parts = [np.arange(first, min(first + _CHUNK, len(source))) for first in range(0, len(source), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        prints = list(pool.map(source.fingerprint, parts))
        cache = _cache_file([one for one in prints if one is not None]) if None not in prints else None
        sizes = None if cache is None else _load(cache, len(source))
        if sizes is None:
            sizes = np.concatenate(list(pool.map(lambda ids: _sizes(source, ids), parts)))
            if cache is not None:
                _save(cache, sizes)
    elapsed_s = time.monotonic() - start
    if elapsed_s > 5:
        logger.info("sizes of %d images read in %.0f s", len(source), elapsed_s)
    return sizes


def _cache_file(prints: Sequence[bytes]) -> Path:
    digest = hashlib.blake2b(_VERSION, digest_size=16)
    for one in prints:
        digest.update(one)
    return cache_dir() / "index" / f"{digest.hexdigest()}.npy"


def _sizes(source: Source, ids: np.ndarray) -> np.ndarray:
    if source.is_decoded:
        import torch

        return np.array([image.shape[:2] for image in source.decoded(ids, torch.device("cpu"))], np.int32)
    return np.array([size_of(source, sample) for sample in ids.tolist()], np.int32)


def size_of(source: Source, sample: int) -> tuple[int, int]:
    """Height and width of an image; 0, 0 if they cannot be read."""
    try:
        with source.open_encoded(sample) as file:
            return header(file)
    except Exception:  # Pillow's plugins raise whatever a damaged header leads them to
        return 0, 0


def header(file: IO[bytes]) -> tuple[int, int]:
    """Height and width in the header of an open image file. Raises what Pillow raises if they cannot be read."""
    with Image.open(file) as image:
        return image.height, image.width


def _load(cache: Path, count: int) -> np.ndarray | None:
    try:
        sizes: np.ndarray = np.load(cache)
    except (OSError, ValueError, EOFError):
        return None
    return sizes if sizes.shape == (count, 2) else None


def _save(cache: Path, sizes: np.ndarray) -> None:
    """Written to a temporary file and renamed. A cache that cannot be written only costs time at the next start."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache.parent, suffix=".tmp", delete=False) as file:
            np.save(file, sizes)
        os.replace(file.name, cache)
    except OSError as error:
        logger.info("the index of image sizes is not kept: %s", error)
