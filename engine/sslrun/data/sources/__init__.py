"""Sources of images, one file each. Every file of this folder is imported here, so a new source needs no other line.

A source of your own may live anywhere: docs/add-a-source.md.
"""

import importlib
import pkgutil

from sslrun.data.sources.base import Source

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Source"]
