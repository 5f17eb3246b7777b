"""A frozen encoder and the images to measure it on, the input of an evaluation."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sslrun.contract import Backbone
from sslrun.data.loader import Augment, Loader
from sslrun.data.order import Sampler
from sslrun.data.sources import Source
from sslrun.data.transforms import Transform
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError
from sslrun.evaluation.features import BATCH, FeatureExtractor


@dataclass(frozen=True)
class FrozenEncoder:
    """A frozen encoder and the images to measure it on.

    Attributes:
        backbone: the network, on `device`, in evaluation mode.
        train: images that classifiers learn from, opened.
        test: images that are classified, opened, with the class numbers of `train`; None if there are none.
        transforms: how images are prepared, without randomness.
        views: the view groups of the encoder's training.
        device: the device of the backbone.
        bf16: whether to compute under bfloat16 autocast.
        augment: "exact", "dali" or "auto", as for training.
        num_threads: threads that read and decode.
        seed: the recipe's seed, for random draws.
    """

    backbone: Backbone
    train: Source
    test: Source | None
    transforms: list[Transform]
    views: list[ViewGroup]
    device: torch.device
    bf16: bool
    augment: Augment
    num_threads: int
    seed: int

    def extractor(self, source: Source) -> FeatureExtractor:
        """An extractor of the backbone's features of a source's images, prepared by `transforms`."""
        return FeatureExtractor(
            source,
            self.transforms,
            device=self.device,
            bf16=self.bf16,
            augment=self.augment,
            num_threads=self.num_threads,
            has_bar=True,
        )

    def loader(self, source: Source, views: list[ViewGroup], sampler: Sampler) -> Loader:
        """A loader of a source's images in views with random draws, at most BATCH samples at once."""
        return Loader(
            source,
            views,
            sampler=sampler,
            seed=self.seed,
            batch_size=BATCH,
            device=self.device,
            augment=self.augment,
            num_threads=self.num_threads,
        )

    def features_share(self, source: Source, ids: np.ndarray | None = None) -> Tensor:
        """(n, D) fp32 on the CPU: features of this rank's share (`distributed.share`) of a source's images.

        Args:
            source: an opened source.
            ids: (N,) sample ids; None for all images.
        """
        ids = np.arange(len(source)) if ids is None else ids
        return self.extractor(source).extract_share(self.backbone, ids)

    def features(self, source: Source, ids: np.ndarray | None = None) -> Tensor:
        """(N, D) fp32 on the CPU: features of all the images, the same on every rank.

        Arguments are those of `features_share`.
        """
        ids = np.arange(len(source)) if ids is None else ids
        return self.extractor(source).extract(self.backbone, ids)

    def labeled(self) -> tuple[Source, Source]:
        """Training and test images with labels. Raises UsageError as the function `labeled`."""
        return labeled(self.train, self.test)


def labeled(train: Source, test: Source | None) -> tuple[Source, Source]:
    """Training and test images of a classification.

    Raises:
        UsageError: there are no test images, or a source has no labels.
    """
    if test is None:
        raise UsageError(
            "there are no images to classify: set eval.test to a source, or data.holdout to a source or to a share of "
            "data.source"
        )
    for key, source in (("eval.train", train), ("eval.test", test)):
        if source.labels is None:
            raise UsageError(f"{source!r} has no labels: set {key} to a source that has some")
    return train, test


def numbered(*labels: Tensor) -> tuple[list[Tensor], int]:
    """Class numbers without gaps, in the order of the labels, and how many there are.

    Labels may be any numbers (those of a list): what is computed for each class is then computed for those that occur.

    Args:
        labels: (N,) int64, (M,) int64, ...; equal labels get equal numbers.
    """
    classes, places = torch.unique(torch.cat(labels), return_inverse=True)
    return list(places.split([len(each) for each in labels])), len(classes)


def labels(source: Source) -> Tensor:
    """(N,) int64 labels of a source that has labels."""
    assert source.labels is not None
    return torch.from_numpy(source.labels).long()
