"""Old configurations as the tests of their import see them."""

from sslrun.config.importer.files import read
from sslrun.config.importer.values import Work, Wrapping
from sslrun.config.node import plain


def evaluated(path):
    """The plain values of an old configuration, and what could not be evaluated, as texts."""
    work = Work()
    old = read(path, work)
    wrapping = Wrapping(work, [])
    root = wrapping.node(old.table, old.table.where)
    lost = [f"{unknown.where}: {'.'.join(map(str, key))}: {unknown.reason}" for key, unknown in wrapping.lost]
    return plain(root), [*lost, *(f"{r.where}: {r.text}: {r.reason}" for r in old.remarks)]
