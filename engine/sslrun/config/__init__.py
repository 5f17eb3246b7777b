"""The config room: TOML files in, typed values and objects out; every value knows its file and line.

Loading, printing and explaining need neither torch nor numpy.
"""

from sslrun.config.component import Component
from sslrun.config.dump import dump
from sslrun.config.load import Config, load

__all__ = ["Component", "Config", "dump", "load"]
