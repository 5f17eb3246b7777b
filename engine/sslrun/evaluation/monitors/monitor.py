"""The contract of a monitor: when it is due, its input and its result.

To add one, write a class like those beside this file and name it in `[[monitor.extra]]` (docs/add-a-metric.md).
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sslrun.config.component import Component
from sslrun.contract import Backbone, Batch, Method, Progress
from sslrun.data.sources import Source
from sslrun.errors import UsageError
from sslrun.evaluation.features import FeatureExtractor
from sslrun.runtime import distributed
from sslrun.runtime.executor import Executor


class ImageSet:
    """Images of one source that monitors measure. Features are extracted once, however many monitors ask for them.

    Every extraction is collective: all ranks call it.

    Args:
        extractor: the extractor of the source.
        ids: (N,) sample ids of the images.
        backbone: the network under training.
    """

    def __init__(self, extractor: FeatureExtractor, ids: np.ndarray, backbone: Backbone) -> None:
        self.extractor, self.ids, self.backbone = extractor, ids, backbone

    @property
    def source(self) -> Source:
        return self.extractor.source

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.extractor.device

    @property
    def labels(self) -> Tensor:
        """(N,) int64 on the CPU: the class of each image; for monitors with `needs_labels`."""
        labels = self.source.labels_of(self.ids)
        assert labels is not None, "a monitor that reads labels sets needs_labels"
        return torch.from_numpy(labels.astype(np.int64))

    @functools.cached_property
    def features_share(self) -> Tensor:
        """(n, D) fp32 on the CPU: the backbone's features of this rank's share of the images."""
        return self.extractor.extract_share(self.backbone, self.ids)

    @functools.cached_property
    def features(self) -> Tensor:
        """(N, D) fp32 on the CPU: the backbone's features of all the images, the same on every rank."""
        return distributed.all_gather_shares(self.features_share.to(self.device), len(self.ids)).cpu()

    def outputs(self, module: nn.Module) -> Tensor:
        """(N, K) fp32 on the CPU: another module's outputs (a classifier's) for the images, on every rank."""
        return self.extractor.extract(module, self.ids)


@dataclass(frozen=True)
class Snapshot:
    """The network between two optimizer steps, and the images to measure it on.

    Attributes:
        executor: holds the method, and computes losses as in training.
        progress: position of the next step; at the end of the run, `progress.step == progress.total_steps`.
        training: monitor.knn_bank of the training images, evenly spaced in the source.
        held_out_images: all held-out images (data.holdout); None if there are none.
        held_out_batches: iterates over the held-out images in global batches and in the views of training; each element
            is the list of this rank's micro-batches. None if there are no held-out images.
    """

    executor: Executor
    progress: Progress
    training: ImageSet
    held_out_images: ImageSet | None
    held_out_batches: Callable[[], Iterator[list[Batch]]] | None

    @property
    def method(self) -> Method:
        """The method under training."""
        return self.executor.method

    @property
    def held_out(self) -> ImageSet:
        """The held-out images, for monitors with `needs_held_out`."""
        assert self.held_out_images is not None, "a monitor that reads held-out images sets needs_held_out"
        return self.held_out_images


class Monitor(Component, kind="monitors"):
    """A measurement of the network under training.

    All ranks call `measure`, without gradient. Its draws from torch's generators do not affect the training. It must
    not change parameters and buffers.

    Args:
        interval: epochs (iterations, if monitor.by is "iter") between two measurements; 0 for none.
    """

    needs_held_out: ClassVar[bool] = False
    """Whether it reads held-out images. Without held-out images it is left out, with a warning."""

    needs_labels: ClassVar[bool] = False
    """Whether it reads labels. With a source without labels it is left out, with a warning."""

    interval: int = 1  # default of subclasses whose __init__ does not set it

    def __init__(self, interval: int = 1) -> None:
        if interval < 0:
            raise UsageError(f"interval must be at least 0, not {interval}")
        self.interval = interval

    def check(self, method: Method, key: str) -> None:
        """Checks, when the run is built, that the method can be measured.

        Args:
            method: the method of the run.
            key: the key in the recipe that sets the interval, for the message.

        Raises:
            UsageError: the method lacks what the monitor measures.
        """

    def measure(self, snapshot: Snapshot) -> dict[str, float]:
        """The measured numbers by name: `group/name` with the unit at its end, such as "knn/top1_pct".

        A stop (Ctrl-C, SIGTERM) is heard when images are read. A measurement with a long loop of its own passes the
        items of the loop through `sslrun.runtime.stopping.stoppable`.
        """
        raise NotImplementedError
