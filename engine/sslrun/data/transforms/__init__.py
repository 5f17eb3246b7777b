"""The transforms of a recipe: their arguments, how many draws each needs, and how draws become numbers.

A transform is written here as numbers, elsewhere as pixels: `exact.py` follows PIL's arithmetic, `graph.py` builds DALI
operators, and the tests hold both against PIL. All consume `parameters()`, the one place where uniform draws become
boxes, factors and yes or no, so that they can be compared image by image.

Legend: B images (or views of images), sizes are (B, 2) height and width of what enters. Numbers and numpy only.
"""

from sslrun.data.transforms.base import Parameters, Transform
from sslrun.data.transforms.color import ColorJitter, GaussianBlur, Normalize, RandomGrayscale, Solarization
from sslrun.data.transforms.geometry import (
    CenterCrop,
    Crop,
    Placing,
    RandomCrop,
    RandomGridPatch,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    Resample,
    Resize,
)
from sslrun.data.transforms.groups import RandomAppliedTrans, SharedTrans

__all__ = [
    "CenterCrop",
    "ColorJitter",
    "Crop",
    "GaussianBlur",
    "Normalize",
    "Parameters",
    "Placing",
    "RandomAppliedTrans",
    "RandomCrop",
    "RandomGrayscale",
    "RandomGridPatch",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "RandomRotation",
    "Resample",
    "Resize",
    "SharedTrans",
    "Solarization",
    "Transform",
]
