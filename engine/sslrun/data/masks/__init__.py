"""The masks of a recipe, one file each; `base.py` is their contract.

Every file of this folder is imported, so a mask exists for recipes as soon as its file is here. The names below are for
Python code.
"""

import importlib
import pkgutil

from sslrun.data.masks.base import Mask, MaskDraws, blocks_of, masks_of
from sslrun.data.masks.block_mask import BlockMask
from sslrun.data.masks.inverse_block_mask import InverseBlockMask
from sslrun.data.masks.multi_block_mask import MultiBlockMask
from sslrun.data.masks.random_mask import RandomMask

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = [
    "BlockMask",
    "InverseBlockMask",
    "Mask",
    "MaskDraws",
    "MultiBlockMask",
    "RandomMask",
    "blocks_of",
    "masks_of",
]
