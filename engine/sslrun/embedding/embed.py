"""`sslrun embed`: a vector for each of many images, on any number of ranks, in memory or in a file.

Batches are cut in the same way whatever the number of ranks, and each is computed as a whole by one rank: the bytes of
the result do not depend on how many ranks there are, nor on interruptions.
"""

import contextlib
import json
import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslrun.data.bad_samples import BadSamples
from sslrun.embedding import outputs
from sslrun.embedding.images import Images, Subject, images_of
from sslrun.embedding.pieces import Pieces, cut
from sslrun.errors import RunFailed, UsageError
from sslrun.evaluation.features import BATCH, FeatureExtractor, evaluating, require_finite, unit_rows
from sslrun.evaluation.partial_result import digest
from sslrun.plan import cores_of_a_rank
from sslrun.preparation import preparation_of
from sslrun.runtime import distributed, heartbeat
from sslrun.runtime.log import start_logging
from sslrun.runtime.numerics import in_full_float32
from sslrun.runtime.signals import StopSignals
from sslrun.runtime.stopping import stoppable
from sslrun.saved import Saved

logger = logging.getLogger("sslrun")

NAMED = 10  # images without a vector that the last message names


@dataclass(frozen=True)
class Settings:
    """How vectors are computed.

    Attributes:
        batch_size: number of images that enter the network at once.
        l2: whether vectors are scaled to length 1.
    """

    batch_size: int = BATCH
    l2: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, not {self.batch_size}")


@dataclass(frozen=True)
class Embedded:
    """A finished file of vectors.

    Attributes:
        path: the file.
        shape: number of images N, and of features D.
        bad: paths of the images that could not be decoded: their rows are NaN.
    """

    path: Path
    shape: tuple[int, int]
    bad: list[str]

    def read(self) -> np.ndarray:
        """(N, D) float32: the vectors."""
        return outputs.read(self.path)


class Undecodable(BadSamples):
    """Images that get no vector: named and counted, with no limit to their number."""

    def __init__(self) -> None:
        super().__init__(max_bad_pct=100.0)

    def set_absent(self, sample: int, epoch: int, name: str, reason: str, num_samples: int) -> None:
        """As `add`, for an image that the storage does not give."""
        self.add(sample, name, reason, num_samples)

    def add(self, sample: int, name: str, reason: str, num_samples: int) -> None:
        """Remembers and names an image."""
        if sample not in self.found:
            self.found[sample] = f"{name}: {reason}"
            logger.warning("no vector for %s: %s", name, reason)

    def replace(self, ids: np.ndarray, seed: int, epoch: int, positions: np.ndarray, num_samples: int) -> np.ndarray:
        """The ids, with the first good image in the place of each bad one: some image has to fill the batch."""
        is_bad = np.array([sample in self.found for sample in ids.tolist()])
        if not is_bad.any():
            return ids
        good = next((sample for sample in range(num_samples) if sample not in self.found), None)
        if good is None:
            last = list(self.found.values())[-1]
            raise RunFailed(f"none of the {num_samples} images can be decoded; the last one: {last}")
        return np.where(is_bad, good, ids)


@heartbeat.naming_lost_ranks()
def embed(saved: Saved, device: torch.device, subject: Subject, settings: Settings) -> np.ndarray:
    """(N, D) float32: vectors of images, the same on all ranks, which all call it. A row is NaN where an image cannot
    be decoded.

    Args:
        saved: the encoder.
        device: where to compute.
        subject: of `images_of`.
        settings: how.

    Raises:
        UsageError: there are no images.
        RunFailed: no image can be decoded, or a vector is not finite.
        Stopped: a signal came.
    """
    with _at_work(saved, device):
        images = images_of(subject, saved)
        batches = [batch for piece in cut(len(images.source), settings.batch_size) for batch in piece]
        mine = batches[distributed.share(len(batches))]
        shares = distributed.gather_objects(list(_rows(saved, device, images, settings, mine)))
        vectors = np.concatenate([rows for share in shares for rows in share])
        _name_bad([images.paths[i] for i in np.flatnonzero(np.isnan(vectors[:, 0])).tolist()], len(vectors))
        return vectors


@heartbeat.naming_lost_ranks()
def embed_to_file(
    saved: Saved,
    device: torch.device,
    subject: Subject,
    settings: Settings,
    path: Path,
    force: bool = False,
) -> Embedded:
    """Writes vectors of images, and their paths, to a file; other arguments and errors are those of `embed`.

    Args:
        path: the file: .npy, .npz or .parquet. Finished pieces are kept in the folder `PATH.part` until it is written.
        force: whether `path` may be replaced.

    Raises:
        UsageError: `path` exists or cannot be written.
        RunFailed: the disk is full.
    """
    with _at_work(saved, device), contextlib.ExitStack() as stack:
        distributed.from_rank_0(lambda: outputs.check(path, force))
        images = images_of(subject, saved)
        cuts = cut(len(images.source), settings.batch_size)
        pieces = Pieces(path, len(cuts))
        stack.callback(pieces.close)
        missing = distributed.from_rank_0(lambda: pieces.open(_identity(saved, images, settings)))
        mine = missing[distributed.share(len(missing))]
        batches = [batch for number in mine for batch in cuts[number]]
        rows = stack.enter_context(contextlib.closing(_rows(saved, device, images, settings, batches)))
        for number in mine:
            pieces.write(number, np.concatenate([next(rows) for _ in cuts[number]]))
        for _ in rows:  # none is left, but the other ranks may have some
            pass
        distributed.largest(0)  # all pieces are written
        embedded = distributed.from_rank_0(lambda: _assembled(pieces, path, images))
    _name_bad(embedded.bad, embedded.shape[0])
    return embedded


@contextlib.contextmanager
def _at_work(saved: Saved, device: torch.device) -> Iterator[None]:
    """Joins the other ranks; within it, signals raise Stopped. What is done is safe, so one process leaves at once."""
    recipe, cores = saved.recipe, cores_of_a_rank(distributed.ranks_on_node())
    with StopSignals() as signals, contextlib.ExitStack() as stack:
        signals.has_nothing_to_save = signals.raises = distributed.world_size() == 1
        stack.push(distributed.leave)
        distributed.init(device, recipe.engine.timeout_s)
        start_logging(distributed.rank(), level=recipe.log.level)
        torch.set_num_threads(recipe.engine.threads or cores)
        saved.backbone.to(device)
        with signals.listening(), in_full_float32(), evaluating(saved.backbone):
            yield


def _rows(
    saved: Saved, device: torch.device, images: Images, settings: Settings, batches: list[np.ndarray]
) -> Generator[np.ndarray, None, None]:
    """Yields (b, D) float32 vectors of each of this rank's batches of ids."""
    recipe = saved.recipe
    extractor = FeatureExtractor(
        images.source,
        preparation_of(recipe),
        device=device,
        augment=recipe.data.augment,
        num_threads=min(recipe.data.workers_per_gpu, cores_of_a_rank(distributed.ranks_on_node())),
        has_bar=True,
        batch_size=settings.batch_size,
        bad=Undecodable(),
    )
    stream = extractor.stream_batches(saved.backbone, batches)
    for ids, (features, found) in zip(batches, stoppable(stream, distributed.largest(len(batches))), strict=True):
        rows = unit_rows(features, torch.device("cpu")) if settings.l2 else features
        is_bad = found.numpy() != ids
        require_finite(rows[torch.from_numpy(~is_bad)])
        rows[torch.from_numpy(is_bad)] = torch.nan
        yield rows.numpy()


def _identity(saved: Saved, images: Images, settings: Settings) -> str:
    """A digest of weights, settings and images, which must be equal to continue."""
    source, values = images.source, saved.config.values
    ids = np.arange(len(source))
    tables = [values.get(key) for key in ("eval", "monitor", "data")]
    text = json.dumps([tables, settings.batch_size, settings.l2, list(images.paths), source.identity()], default=str)
    state: dict[str, Tensor] = dict(saved.backbone.state_dict())
    return digest(text + repr(source.fingerprint(ids)), state)


def _assembled(pieces: Pieces, path: Path, images: Images) -> Embedded:
    """Writes the file, and removes the pieces."""
    is_bad: list[np.ndarray] = []

    def rows() -> Iterator[np.ndarray]:
        for piece in pieces.rows():
            is_bad.append(np.isnan(piece[:, 0]))
            yield piece

    shape = len(images.source), next(pieces.rows()).shape[1]
    outputs.write(path, rows(), shape, images.paths)
    pieces.remove()
    return Embedded(path, shape, [images.paths[i] for i in np.flatnonzero(np.concatenate(is_bad)).tolist()])


def _name_bad(bad: list[str], num_images: int) -> None:
    if bad and distributed.rank() == 0:
        some = ", ".join(bad[:NAMED]) + (", ..." if len(bad) > NAMED else "")
        logger.warning("%d of %d images could not be decoded, their rows are NaN: %s", len(bad), num_images, some)
