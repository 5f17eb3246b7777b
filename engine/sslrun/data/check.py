"""Examines every image of a source before training: whether it decodes, its size, and whether it is a copy.

An image is good if a run would take it: Pillow reads its header, as the index of a run does, and DALI decodes it to
that size with the operators that a run has on the CPU. Threads of this process read headers and hash the images; the
process keeps 40 bytes of each (hash, size, verdict) and no name. Another process decodes, which an image may kill.
"""

import hashlib
import io
import logging
import os
import re
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from sslrun.data import dali, waiting
from sslrun.data.decoding import TrialProcess, other_size
from sslrun.data.levels import kind
from sslrun.data.outage import Unreadable, unreadable
from sslrun.data.reading import read_all
from sslrun.data.sources import Source
from sslrun.errors import RunFailed
from sslrun.runtime import durable

logger = logging.getLogger("sslrun")

_CHUNK = 64  # images per task of a reader; at most as many are decoded at once
_MOST_READERS = 16
_PIXELS_PER_THREAD = 2**24  # decoded at once, unless a single image has more
_SMALL = 2**17  # bytes of a file that is kept until it is decoded; a larger one is read again

# libjpeg writes this about an image that it decodes all the same, gray or shifted from some line on. Bytes between the
# end of the pixels and the end marker do no harm.
_COMPLAINT = re.compile(r"Corrupt JPEG data: (?!\d+ extraneous bytes before marker 0xd9)(.+)")


class Verdict(IntEnum):
    """The result for an image; the first that applies."""

    UNSEEN = 0
    GOOD = 1
    UNREADABLE = 2
    """A run would replace it by another image."""
    HUGE = 3
    """Not decoded."""
    DAMAGED = 4
    """It decodes, but a part of it is lost."""
    TINY = 5
    SHARED = 6
    """In a training source: the same image is in a source to measure on."""
    DUPLICATE = 7
    """The same image has a smaller id in the source."""
    NOT_READ = 8
    """The storage gave an error, which says nothing about the image."""


@dataclass(frozen=True)
class Limits:
    """Limits of image sizes.

    Attributes:
        min_side: smallest accepted length of the shorter side, pixels.
        max_pixels: largest accepted number of pixels, height x width.
    """

    min_side: int
    max_pixels: int


class Survey:
    """Results for a source's N images.

    Args:
        source: opened.
        keys: keys of the config that name the source, such as data.source.
        is_measured: whether the source holds images to measure on, which must not be trained on.

    Attributes:
        verdicts: (N,) uint8, of `Verdict`.
        sizes: (N, 2) int32, height and width; 0, 0 if they are not known.
        digests: (N, 16) uint8, BLAKE2b of the image file (of the pixels, if the source gives decoded images).
        originals: (N,) int64, for a copy: id of the first image with the same content.
        owners: (N,) int8, for a copy: number of the survey that has this first image.
    """

    def __init__(self, source: Source, keys: Sequence[str], is_measured: bool = False) -> None:
        count = len(source)
        self.source, self.keys, self.is_measured = source, list(keys), is_measured
        self.verdicts = np.full(count, Verdict.UNSEEN, dtype=np.uint8)
        self.sizes = np.zeros((count, 2), dtype=np.int32)
        self.digests = np.zeros((count, 16), dtype=np.uint8)
        self.originals = np.full(count, -1, dtype=np.int64)
        self.owners = np.full(count, -1, dtype=np.int8)
        self._reasons = np.full(count, -1, dtype=np.int32)
        self._texts: dict[str, int] = {}  # each text once, with its number, however many images it is about

    def ids(self, verdict: Verdict) -> np.ndarray:
        """Ids of the images with a verdict, ascending."""
        return np.flatnonzero(self.verdicts == verdict)

    def judge(self, i: int, verdict: Verdict, reason: str = "") -> None:
        """Enter a verdict and its reason."""
        self.verdicts[i] = verdict
        self._reasons[i] = self._texts.setdefault(reason, len(self._texts)) if reason else -1

    def reason(self, i: int) -> str:
        """Reason of an image's verdict; its height and width if there is none."""
        return list(self._texts)[self._reasons[i]] if self._reasons[i] >= 0 else "x".join(map(str, self.sizes[i]))


def examine(surveys: Sequence[Survey], limits: Limits, workers: int, progress: Callable[[int], object]) -> bool:
    """Examine every image. Copies are marked afterwards, by `mark_copies`.

    Args:
        surveys: filled one after the other.
        limits: limits of image sizes.
        workers: number of threads that decode; twice as many read.
        progress: called with a number of further images that are done.

    Returns:
        False if Ctrl-C came before the last image.

    Raises:
        RunFailed: DALI does not work.
    """
    try:
        with TrialProcess(_CHUNK, workers) as trial, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd headers
            for survey in surveys:
                if survey.source.is_decoded:
                    _examine_decoded(survey, progress)
                else:
                    dali.require("decoding images")
                    _examine_encoded(survey, limits, workers, trial, progress)
    except KeyboardInterrupt:
        return False
    except RuntimeError as error:
        raise RunFailed(f"no image can be decoded: {error}") from error
    finally:
        for survey in surveys:
            is_tiny = (survey.verdicts == Verdict.GOOD) & (survey.sizes.min(axis=1) < limits.min_side)
            survey.verdicts[is_tiny] = Verdict.TINY
    return True


def mark_copies(surveys: Sequence[Survey]) -> None:
    """Mark good images that are copies within a source, and training images that are in a source to measure on."""
    good = [survey.ids(Verdict.GOOD) for survey in surveys]
    owner = np.repeat(np.arange(len(surveys)), [len(ids) for ids in good])
    keys = np.concatenate([s.digests[ids] for s, ids in zip(surveys, good, strict=True)]).view(np.uint64)
    order = np.lexsort(keys.T)  # stable: equal ones stay in the order of the sources, and of their images
    owner, keys, ids = owner[order], keys[order], np.concatenate(good)[order]
    if len(ids) == 0:
        return
    is_new = np.append(True, (keys[1:] != keys[:-1]).any(axis=1))
    group = np.cumsum(is_new) - 1
    is_first = is_new | np.append(True, owner[1:] != owner[:-1])  # of the equal images in its source
    first = np.maximum.accumulate(np.where(is_first, np.arange(len(ids)), 0))
    is_measured = np.array([survey.is_measured for survey in surveys])[owner]
    measured = np.full(group[-1] + 1, len(ids))  # row of the first equal image to measure on; len(ids) if there is none
    np.minimum.at(measured, group[is_measured], np.flatnonzero(is_measured))
    is_shared = ~is_measured & (measured < len(ids))[group]
    for verdict, is_copy, original in (
        (Verdict.DUPLICATE, ~is_first & ~is_shared, first),
        (Verdict.SHARED, is_shared, measured[group]),
    ):
        for k, survey in enumerate(surveys):
            rows = np.flatnonzero(is_copy & (owner == k))
            survey.verdicts[ids[rows]] = verdict
            survey.originals[ids[rows]] = ids[original[rows]]
            survey.owners[ids[rows]] = owner[original[rows]]


def _examine_decoded(survey: Survey, progress: Callable[[int], object]) -> None:
    """Decoded images have no file that could be damaged."""
    source = survey.source
    for first in range(0, len(source), _CHUNK):
        ids = np.arange(first, min(first + _CHUNK, len(source)))
        pixels = source.decoded(ids, torch.device("cpu"))
        survey.sizes[ids] = source.sizes[ids]
        survey.digests[ids] = [_as_bytes(_hash(image.tobytes())) for image in pixels]
        survey.verdicts[ids] = Verdict.GOOD
        progress(len(ids))


def _examine_encoded(
    survey: Survey, limits: Limits, workers: int, trial: TrialProcess, progress: Callable[[int], object]
) -> None:
    """Examine all images; those that the storage gives errors for are examined again, for `durable.RETRY_S`."""
    _examine_some(survey, np.arange(len(survey.source)), limits, workers, trial, progress)
    deadline, pause_s = time.monotonic() + durable.RETRY_S, durable.FIRST_PAUSE_S
    while len(left := survey.ids(Verdict.NOT_READ)) and time.monotonic() < deadline:
        if pause_s == durable.FIRST_PAUSE_S:
            first, text = int(left[0]), "storage error: %s: %s; tried again for %.0f s; images that wait: %d"
            logger.warning(text, survey.source.names[first], survey.reason(first), durable.RETRY_S, len(left))
        time.sleep(min(pause_s, max(0.0, deadline - time.monotonic())))
        pause_s *= 2
        _examine_some(survey, left, limits, workers, trial, lambda _: None)


def _examine_some(
    survey: Survey,
    ids: np.ndarray,
    limits: Limits,
    workers: int,
    trial: TrialProcess,
    progress: Callable[[int], object],
) -> None:
    """Images are read in order, a few chunks ahead of decoding, which finds the larger ones in the disk's cache."""
    readers, wait = min(2 * workers, _MOST_READERS), waiting.Wait()
    stop = threading.Event()
    threads = waiting.Threads(readers, "sslrun-check")
    chunks = iter([ids[first : first + _CHUNK].tolist() for first in range(0, len(ids), _CHUNK)])
    flying: deque[tuple[list[int], Future[tuple[_Troubles, _Contents]]]] = deque()

    def read_ahead() -> None:
        chunk = next(chunks, None)
        if chunk is not None:
            flying.append((chunk, threads.submit(_read, survey, chunk, limits.max_pixels, stop)))

    try:
        for _ in range(readers + 2):
            read_ahead()
        while flying:
            chunk, future = flying.popleft()
            wait.begin()
            troubles, contents = waiting.result(future, wait)
            wait.end()
            read_ahead()
            for i, (verdict, reason) in troubles.items():
                survey.judge(i, verdict, reason)
            progress(len(troubles))
            readable = [i for i in chunk if i not in troubles]
            for batch in _batches(readable, survey.sizes, _PIXELS_PER_THREAD * workers):
                _decode(survey, batch, contents, trial)
                progress(len(batch))
    finally:
        stop.set()
        threads.close()


_Troubles = dict[int, tuple[Verdict, str]]
_Contents = dict[int, bytes]


def _read(survey: Survey, ids: list[int], max_pixels: int, stop: threading.Event) -> tuple[_Troubles, _Contents]:
    """Enter sizes and hashes of some images; returns verdict and reason of those that are not to be decoded, and the
    content of the small ones."""
    troubles: _Troubles = {}
    contents: _Contents = {}
    for i in ids:
        if stop.is_set():
            break
        waiting.note(survey.source.names[i])
        try:
            file = survey.source.open_encoded(i)
        except (OSError, ValueError) as error:
            troubles[i] = _trouble(survey, error)
            continue
        with file:
            trouble, content = _inspect(survey, i, file, max_pixels)
        if trouble is not None:
            troubles[i] = trouble
        elif (
            content and not survey.source.has_bands and kind(io.BytesIO(content)) is None
        ):  # others are read as a run reads them
            contents[i] = content
    return troubles, contents


def _inspect(
    survey: Survey, i: int, file: BinaryIO, max_pixels: int
) -> tuple[tuple[Verdict, str] | None, bytes | None]:
    """Enter an image's size and hash; returns the verdict and its reason if the image is not to be decoded, and the
    content if it is small."""
    try:
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        content = file.read() if length <= _SMALL else None
        if length == 0:
            return (Verdict.UNREADABLE, "the file is empty"), None
        height, width = survey.source.size_in_header(file if content is None else io.BytesIO(content))
        survey.sizes[i] = height, width
        if height * width > max_pixels:
            return (Verdict.HUGE, ""), None
        if height * width == 0:
            return (Verdict.UNREADABLE, "its header says that it has no pixels"), None
        if content is None:
            file.seek(0)
            digest = hashlib.file_digest(file, _hash)  # type: ignore[arg-type]
        else:
            digest = _hash(content)
        survey.digests[i] = _as_bytes(digest)
        return None, content
    except Image.DecompressionBombError:  # a run does not take it either
        return (Verdict.HUGE, f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"), None
    except Exception as error:  # Pillow's plugins raise whatever a damaged header leads them to
        if isinstance(error, OSError) and error.strerror:  # the disk's
            return _trouble(survey, error), None
        return (Verdict.UNREADABLE, "not an image, or its header is broken"), None


def _trouble(survey: Survey, error: OSError | ValueError) -> tuple[Verdict, str]:
    """Verdict and reason of an image that cannot be read."""
    return _verdict(unreadable(error, survey.source.files_root))


def _verdict(read: Unreadable) -> tuple[Verdict, str]:
    return Verdict.NOT_READ if read.is_outage else Verdict.UNREADABLE, read.reason


def _decode(survey: Survey, ids: Sequence[int], contents: _Contents, trial: TrialProcess) -> None:
    """Verdicts of images whose headers are fine; if something is wrong with one of them, they are tried alone."""
    again = np.array([i for i in ids if i not in contents], dtype=np.int64)
    reads = dict(zip(again.tolist(), read_all(survey.source, again), strict=True)) if len(again) else {}
    encoded = []
    for i in ids:
        read = np.frombuffer(contents[i], dtype=np.uint8) if i in contents else reads[i]
        if isinstance(read, Unreadable):
            survey.judge(i, *_verdict(read))
        elif survey.source.has_bands:  # what has been read are the pixels
            survey.judge(i, Verdict.GOOD)
        else:
            encoded.append((i, read))
    if encoded:
        _decode_all(survey, encoded, trial)


def _decode_all(survey: Survey, encoded: Sequence[tuple[int, np.ndarray]], trial: TrialProcess) -> None:
    answer = trial.sizes([image for _, image in encoded])
    complaint = _COMPLAINT.search(answer.stderr)
    if len(encoded) > 1 and (answer.sizes is None or complaint):
        for one in encoded:
            _decode_all(survey, [one], trial)
        return
    if answer.sizes is None:
        survey.judge(encoded[0][0], Verdict.UNREADABLE, answer.trouble)
        return
    for (i, _), size in zip(encoded, answer.sizes, strict=True):
        if (size != survey.sizes[i]).any():
            survey.judge(i, Verdict.UNREADABLE, other_size(size, survey.sizes[i]))
        elif complaint:
            survey.judge(i, Verdict.DAMAGED, complaint[1].strip())
        else:
            survey.judge(i, Verdict.GOOD)


def _batches(ids: list[int], sizes: np.ndarray, most_pixels: int) -> Iterator[list[int]]:
    """The ids in parts of at most `most_pixels` pixels, or of one image."""
    batch: list[int] = []
    pixels = 0
    for i in ids:
        own = int(sizes[i, 0]) * int(sizes[i, 1])
        if batch and pixels + own > most_pixels:
            yield batch
            batch, pixels = [], 0
        batch.append(i)
        pixels += own
    if batch:
        yield batch


def _hash(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=16)


def _as_bytes(digest: Any) -> np.ndarray:
    return np.frombuffer(digest.digest(), dtype=np.uint8)
