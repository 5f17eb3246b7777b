"""Finished pieces of a file of vectors, in a folder beside it: what a killed `sslrun embed` continues from.

A piece is some whole batches. Which images form a batch, and which batches a piece, depends on the number of images and
the size of a batch alone, so that any number of ranks computes the same bytes, before and after an interruption.
"""

import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sslrun.errors import RunFailed
from sslrun.runtime import folder_lock
from sslrun.runtime.durable import replace_or_fail

logger = logging.getLogger("sslrun")

IDENTITY = "identity.json"
FEW, MOST = 256, 16  # pieces below which a piece is one batch; batches of a piece


def cut(num_images: int, batch_size: int) -> list[list[np.ndarray]]:
    """The ids (b,) int64 of the images of each batch of each piece."""
    batches = [np.arange(first, min(first + batch_size, num_images)) for first in range(0, num_images, batch_size)]
    step = min(max(len(batches) // FEW, 1), MOST)
    return [batches[first : first + step] for first in range(0, len(batches), step)]


class Pieces:
    """The pieces that are done. All ranks write, rank 0 does the rest.

    Args:
        output: the file of vectors. The folder of the pieces is `OUTPUT.part`.
        count: number of pieces.
    """

    def __init__(self, output: Path, count: int) -> None:
        self.folder, self.count = output.with_name(output.name + ".part"), count
        self._lock: int | None = None

    def open(self, identity: str) -> list[int]:
        """The numbers of the pieces that are to be made.

        Args:
            identity: a text that differs for other images, weights or settings: pieces of another one are removed, with
                a warning.

        Raises:
            UsageError: another process uses the folder, or it cannot be made.
            RunFailed: the folder cannot be read or written.
        """
        kept = self.folder / IDENTITY
        self._lock = folder_lock.take(self.folder, "the folder")
        try:
            if kept.is_file() and json.loads(kept.read_bytes()) == identity:
                missing = [number for number in range(self.count) if self._rows(number) is None]
                done = self.count - len(missing)
                logger.info("continuing: %d %% of the images are embedded already", 100 * done // self.count)
                return missing
            if kept.exists():
                logger.warning("%s is of other weights, images or settings: starting over", self.folder)
            for old in self.folder.glob("[!.]*"):
                old.unlink()
        except (OSError, ValueError) as error:
            raise RunFailed(f"{self.folder} cannot be used: {getattr(error, 'strerror', None) or error}") from error
        replace_or_fail(kept, json.dumps(identity).encode())
        return list(range(self.count))

    def write(self, number: int, rows: np.ndarray) -> None:
        """Keeps a finished piece, (n, D) float32. Raises RunFailed if it cannot be written."""
        content = io.BytesIO()
        np.save(content, rows, allow_pickle=False)
        replace_or_fail(self._path(number), content.getvalue())

    def rows(self) -> Iterator[np.ndarray]:
        """All pieces in order, which are done."""
        for number in range(self.count):
            rows = self._rows(number)
            if rows is None:
                raise RunFailed(f"{self._path(number)} was removed or damaged: the same command makes it again")
            yield rows

    def remove(self) -> None:
        """Removes the folder, after the file of vectors is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Lets another process use the folder."""
        if self._lock is not None:
            os.close(self._lock)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.npy"

    def _rows(self, number: int) -> np.ndarray | None:
        try:
            rows: np.ndarray = np.load(self._path(number), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return rows
