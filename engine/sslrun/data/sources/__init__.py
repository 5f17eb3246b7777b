"""Sources of images, one file each. Every file of this folder is imported here, so a new source needs no other line.

A source of your own may live anywhere: docs/add-a-source.md.
"""

import importlib
import pkgutil

from sslrun.data.sources.base import Source
from sslrun.data.sources.cifar import CIFAR10, CIFAR100
from sslrun.data.sources.files import FileSource
from sslrun.data.sources.fraction import Fraction
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.sources.image_list import ImageList
from sslrun.data.sources.imagenet import ImageNet
from sslrun.data.sources.imagenet100 import ImageNet100
from sslrun.data.sources.inaturalist2018 import INaturalist2018
from sslrun.data.sources.places205 import Places205
from sslrun.data.sources.shapes import Shapes
from sslrun.data.sources.stl10 import STL10
from sslrun.data.sources.subset import Subset, split_holdout

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "STL10",
    "FileSource",
    "Fraction",
    "INaturalist2018",
    "ImageFolder",
    "ImageList",
    "ImageNet",
    "ImageNet100",
    "Places205",
    "Shapes",
    "Source",
    "Subset",
    "split_holdout",
]
