"""The methods, one file each. Every file of this folder is imported here, so a new method needs no other line."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
