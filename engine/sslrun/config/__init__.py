"""Configs: TOML files become typed values and objects; every value knows the file and line that set it.

Loading, printing and explaining need neither torch nor numpy.
"""

from sslrun.config.component import Component
from sslrun.config.dump import dump
from sslrun.config.load import Config, load

__all__ = ["Component", "Config", "dump", "load"]
