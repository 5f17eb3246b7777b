"""Keeps the features of many images in memory or, if they are too large, in a file; and normalizes them."""

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sslrun.contract import Backbone
from sslrun.errors import RunFailed, UsageError
from sslrun.evaluation.features import FeatureExtractor, require_finite
from sslrun.runtime import distributed

logger = logging.getLogger(__name__)

GIB = 2**30
CHUNK = 1024  # rows that are read together


class FeatureCache:
    """Features and labels of a source's images, extracted once; each rank keeps its share.

    Features are kept as fp32 if those of all ranks take at most `memory_gib`, else as fp16. This rank's share is kept
    in memory if it takes at most as much, else in an unnamed file that is deleted with the object.

    Args:
        extractor: extracts the features of a source with labels.
        backbone: the encoder, in evaluation mode.
        memory_gib: memory per process for features, in GiB.
        folder: folder of the file; None for the system's folder for temporary files.

    Raises:
        UsageError: there is no room for the file.
        RunFailed: the features are not finite, or too large for fp16.
    """

    def __init__(
        self, extractor: FeatureExtractor, backbone: Backbone, *, memory_gib: float, folder: str | None = None
    ) -> None:
        source, self.device = extractor.source, extractor.device
        assert source.labels is not None
        self.num_samples = len(source)
        share = distributed.share(self.num_samples)
        self.first, count = share.start, share.stop - share.start
        self.labels = torch.empty(count, dtype=torch.int64)
        self.rows = torch.empty(0, 0)
        at = 0
        for rows, ids in extractor.stream_share(backbone):
            if at == 0:
                self.rows = self._allocated(count, rows.shape[1], memory_gib, folder, repr(source))
            self.rows[at : at + len(rows)] = rows
            self.labels[at : at + len(rows)] = torch.from_numpy(source.labels[ids.numpy()])
            require_finite(rows)
            if not self.rows[at : at + len(rows)].isfinite().all():
                raise RunFailed(f"features up to {rows.abs().max():.3g} do not fit fp16: raise eval.linear.cache_gib")
            at += len(rows)
        assert at == count
        self.labels = self.labels.to(self.device)
        if self.device.type == "cuda" and 2 * self.rows.nbytes <= torch.cuda.mem_get_info(self.device)[0]:
            self.rows = self.rows.to(self.device)

    @property
    def num_features(self) -> int:
        """Number of features D of an image."""
        return self.rows.shape[1]

    def take(self, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features (b, D) fp32 and labels (b,), on the device, of those of `ids` that are in this rank's share."""
        here = ids[(ids >= self.first) & (ids < self.first + len(self.rows))] - self.first
        index = torch.from_numpy(here)
        rows = self.rows.index_select(0, index.to(self.rows.device))
        return rows.to(self.device).float(), self.labels[index.to(self.device)]

    def chunks(self, ids: np.ndarray | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the result of `take` for many samples (None for all), CHUNK rows at a time."""
        ids = np.arange(self.num_samples) if ids is None else ids
        ids = ids[(ids >= self.first) & (ids < self.first + len(self.rows))]
        for at in range(0, len(ids), CHUNK):
            yield self.take(ids[at : at + CHUNK])

    def _allocated(self, count: int, width: int, memory_gib: float, folder: str | None, name: str) -> Tensor:
        dtype = torch.float32 if 4 * self.num_samples * width <= memory_gib * GIB else torch.float16
        num_bytes = count * width * dtype.itemsize
        is_file = num_bytes > memory_gib * GIB
        folder = folder or tempfile.gettempdir()
        where = f"a file in {folder}" if is_file else "memory"
        size = f"{self.num_samples} x {width} features, {num_bytes / 2**20:,.1f} MiB"
        each = " on each rank" if distributed.world_size() > 1 else ""
        logger.info("%s: %s%s as %s in %s", name, size, each, str(dtype).removeprefix("torch."), where)
        return _file(count, width, num_bytes, folder) if is_file else torch.empty(count, width, dtype=dtype)


class Normalization:
    """Normalizes features before a linear classifier, without learned scale or shift.

    Args:
        kind: "batch" is BatchNorm, with statistics of the batch over all ranks in training and running statistics
            otherwise; "standardize" uses mean and standard deviation of all training features, and sets constant
            features to 0; "none" is no normalization.
        num_features: number of features D of an image.
        device: device of the features.
    """

    eps = 1e-6  # that of MAE's BatchNorm
    momentum = 0.1

    def __init__(self, kind: Literal["none", "batch", "standardize"], num_features: int, device: torch.device) -> None:
        self.kind = kind
        self.mean = torch.zeros(num_features, device=device)
        self.variance = torch.ones(num_features, device=device)
        self.scale = torch.ones(num_features, device=device)

    def fit(self, chunks: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Computes the statistics of "standardize" from training features; each rank passes its own."""
        if self.kind != "standardize":
            return
        mean, variance, _ = self._statistics(rows for rows, _ in chunks)
        spread = variance.sqrt()
        varies = spread > 1e-5 * (variance + mean.square()).sqrt()  # above the rounding error of a constant
        self.mean, self.scale = mean.float(), torch.where(varies, 1 / spread, 0.0).float()

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors that training changes, to be saved or overwritten in place."""
        return {"mean": self.mean, "variance": self.variance, "scale": self.scale}

    def train(self, rows: Tensor) -> Tensor:
        """Normalized features (b, D) of a training batch; each rank passes its part of the batch."""
        if self.kind != "batch":
            return self(rows)
        mean, variance, count = self._statistics([rows])
        self.mean.lerp_(mean.float(), self.momentum)
        self.variance.lerp_((variance * count / (count - 1)).float(), self.momentum)
        self.scale.copy_((self.variance + self.eps).rsqrt())
        return ((rows - mean) * (variance + self.eps).rsqrt()).float()

    def __call__(self, rows: Tensor) -> Tensor:
        """Normalized features (b, D), by the current statistics."""
        return rows if self.kind == "none" else (rows - self.mean) * self.scale

    def _statistics(self, chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (D,), biased variance (D,) and number of the rows of all ranks, float64."""
        width = len(self.mean)
        sums = torch.zeros(2 * width + 1, dtype=torch.float64, device=self.mean.device)
        for rows in chunks:
            sums += torch.cat([rows.double().sum(0), rows.double().square().sum(0), sums.new_tensor([len(rows)])])
        distributed.all_reduce_sum_(sums)
        mean, squares = sums[:width] / sums[-1], sums[width:-1] / sums[-1]
        return mean, (squares - mean.square()).clamp_min(0), sums[-1]


def _file(count: int, width: int, num_bytes: int, folder: str) -> Tensor:
    """(count, width) fp16 in an unnamed file, whose space is allocated at once."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            mapped: Any = np.memmap(file, dtype=np.float16, mode="r+", shape=(count, width))
    except OSError as error:
        need = f"no room for {num_bytes / GIB:.3g} GiB of features in {folder}: {error.strerror}"
        raise UsageError(f"{need}; point eval.linear.cache_dir elsewhere, or raise eval.linear.cache_gib") from error
    return torch.from_numpy(mapped)
