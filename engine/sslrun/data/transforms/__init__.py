"""The transforms of a recipe, one file each; `base.py` is their contract.

Every file of this folder is imported, so a transform exists for recipes as soon as its file is here. The names below
are for Python code.
"""

import importlib
import pkgutil

from sslrun.data.transforms.base import Numbers, Transform
from sslrun.data.transforms.center_crop import CenterCrop
from sslrun.data.transforms.color_jitter import ColorJitter
from sslrun.data.transforms.gaussian_blur import GaussianBlur
from sslrun.data.transforms.normalize import Normalize
from sslrun.data.transforms.rand_augment import RandAugment
from sslrun.data.transforms.random_applied import RandomAppliedTrans
from sslrun.data.transforms.random_crop import RandomCrop
from sslrun.data.transforms.random_erasing import RandomErasing
from sslrun.data.transforms.random_grayscale import RandomGrayscale
from sslrun.data.transforms.random_grid_patch import RandomGridPatch
from sslrun.data.transforms.random_horizontal_flip import RandomHorizontalFlip
from sslrun.data.transforms.random_resized_crop import RandomResizedCrop
from sslrun.data.transforms.random_rotation import RandomRotation
from sslrun.data.transforms.resize import Resize
from sslrun.data.transforms.shared import SharedTrans
from sslrun.data.transforms.solarization import Solarization

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = [
    "CenterCrop",
    "ColorJitter",
    "GaussianBlur",
    "Normalize",
    "Numbers",
    "RandAugment",
    "RandomAppliedTrans",
    "RandomCrop",
    "RandomErasing",
    "RandomGrayscale",
    "RandomGridPatch",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "RandomRotation",
    "Resize",
    "SharedTrans",
    "Solarization",
    "Transform",
]
