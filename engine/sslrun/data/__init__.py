"""From files to batches: sources, order, draws, transforms, DALI and the exact stage. The only room that knows DALI."""

from sslrun.data.bad_samples import BadSamples
from sslrun.data.data_config import DataConfig
from sslrun.data.loader import BatchStream, Loader, resolve_augment
from sslrun.data.order import Balanced, Order, Sampler, Sequential
from sslrun.data.sources import (
    CIFAR10,
    CIFAR100,
    STL10,
    FileSource,
    Fraction,
    ImageFolder,
    ImageList,
    ImageNet,
    ImageNet100,
    INaturalist2018,
    Places205,
    Shapes,
    Source,
    Subset,
    split_holdout,
)
from sslrun.data.transforms import Transform
from sslrun.data.views import ViewGroup

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "STL10",
    "BadSamples",
    "Balanced",
    "BatchStream",
    "DataConfig",
    "FileSource",
    "Fraction",
    "INaturalist2018",
    "ImageFolder",
    "ImageList",
    "ImageNet",
    "ImageNet100",
    "Loader",
    "Order",
    "Places205",
    "Sampler",
    "Sequential",
    "Shapes",
    "Source",
    "Subset",
    "Transform",
    "ViewGroup",
    "resolve_augment",
    "split_holdout",
]
