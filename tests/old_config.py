"""Old configs as the tests of their import see them."""

from sslrun.config.node import plain
from sslrun.importer.reader import read


def evaluated(path):
    """The plain values of an old config."""
    return plain(read(path).root)
