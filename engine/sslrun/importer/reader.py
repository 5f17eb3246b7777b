"""Reads an old config with its bases, as mmcv and mmengine do, without executing any of it.

`_base_` names files that are merged below the file: dicts deeply, all else replaced, and `_delete_=True` in a dict
drops what it inherits. `_base_.x` and `{{_base_.x}}` are values of the merged bases.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from sslrun.config.dump import escape
from sslrun.config.files import shorten
from sslrun.config.node import Key, Layer, Node, Origin, show
from sslrun.errors import UsageError
from sslrun.importer import files
from sslrun.importer.language import Scope
from sslrun.importer.values import Row, Table, Work, kind_of

DELETE = "_delete_"
MAX_FILES, MAX_CHAIN, MAX_DEPTH = 100, 32, 64


class Old(NamedTuple):
    """An old config, merged.

    Attributes:
        root: the values.
        unread: top-level names that no expression reads, with their places: keys of the config, or idle variables.
        notes: (place, text, message) of templates that were replaced by their defaults.
    """

    root: Node
    unread: dict[str, Origin]
    notes: list[tuple[Origin, str, str]]


class _Lines(dict[Key, int]):
    """The line of each key of a file whose keys are line numbers."""

    def get(self, key: Key, default: Any = None) -> Any:
        return key[0]


def read(path: Path) -> Old:
    """Reads an old config. Raises UsageError, one line, for what cannot be read."""
    reader = _Reader()
    try:
        table = reader.file(path, ())
        return Old(reader.node(table, table.where), reader.unread, reader.notes)
    except RecursionError:
        raise UsageError(f"{shorten(path)}: nested too deep") from None


class _Reader:
    """The files read so far."""

    def __init__(self) -> None:
        self.work, self.count = Work(), 0
        self.unread: dict[str, Origin] = {}
        self.notes: list[tuple[Origin, str, str]] = []

    def file(self, path: Path, above: tuple[Path, ...]) -> Table:
        """One file with its bases merged below it."""
        text = files.text_of(path)
        path = Path(os.path.realpath(path))
        chain = (*above, path)
        if path in above:
            raise UsageError(f"_base_ goes in a circle: {' -> '.join(map(shorten, chain))}")
        if len(chain) > MAX_CHAIN or self.count >= MAX_FILES:
            raise UsageError(f"{shorten(path)}: more than {MAX_CHAIN} files in a row or {MAX_FILES} in all")

        def inherit(named: Any, where: Origin) -> Table:
            return self.bases(named, where, chain)

        layer = Layer(self.count, shorten(path), str(path.parent), tuple(map(shorten, chain)), _Lines)
        text, notes = files.filled_in(text, path)
        self.notes += [(Origin(layer, (line,), None), shown, message) for line, shown, message in notes]
        scope = Scope(layer, self.work, inherit)
        scope.run(files.parsed(text, layer.source))
        self.count += 1
        unread = {name: where for name, where in self.unread.items() if name not in scope.used_of_bases}
        self.unread = unread | {name: at for name, at in scope.names.places.items() if name not in scope.used}
        return scope.names if scope.bases is None else self.merge(scope.names, scope.bases, ())

    def bases(self, named: Any, where: Origin, chain: tuple[Path, ...]) -> Table:
        """The bases of a file as one dict; no two of them may set the same name."""
        names = list(named) if isinstance(named, list | tuple) else [named]
        if not all(isinstance(name, str) for name in names):
            raise UsageError(f"{where}: _base_: expected a path or a list of paths")
        merged = Table(where)
        for name in names:
            path = Path(where.layer.folder, name)
            if "::" in name:
                raise UsageError(f"{where}: _base_: {name!r} is a file of another package, which is not at hand here")
            if not os.path.isfile(path):
                raise UsageError(f"{where}: _base_: {files.missing(path)}")
            if path.suffix != ".py":
                raise UsageError(f"{where}: _base_: {shorten(path)} is not a Python file")
            base = self.file(path, chain)
            for key in base.keys() & merged.keys():
                both = f"{base.places[key]} and {merged.places[key]}"
                raise UsageError(f"{where}: _base_: {key} is set by two of the bases, at {both}")
            merged.put_all(base)
        return merged

    def merge(self, new: Table, old: Table, key: Key) -> Table:
        """`new` over `old`."""
        self.work.charge(len(new) + len(old), new.where)
        if len(key) > MAX_DEPTH:
            raise UsageError(f"{new.where}: dicts nested more than {MAX_DEPTH} deep")
        merged = Table(new.where)
        merged.put_all(old)
        for part, value in new.items():
            if isinstance(value, Table) and part in old and not value.get(DELETE):
                if not isinstance(old[part], Table):
                    what = f"a dict cannot go over {kind_of(old[part])}, set at {old.places[part]}"
                    hint = "`_delete_=True` in it would replace that"
                    raise UsageError(f"{new.places[part]}: {show((*key, part))}: {what}; {hint}")
                value = self.merge(value, old[part], (*key, part))
            merged.put(part, value, new.places[part])
        return merged

    def node(self, value: Any, where: Origin, depth: int = 0) -> Node:
        """A value as nodes, without `_delete_`."""
        self.work.charge(1, where)
        if depth > MAX_DEPTH:
            raise UsageError(f"{where}: dicts or lists nested more than {MAX_DEPTH} deep")
        if isinstance(value, Table):
            kept = {key: below for key, below in value.items() if key != DELETE}
            nodes = {key: self.node(below, value.places[key], depth + 1) for key, below in kept.items()}
            return Node(nodes, (value.where,))
        if isinstance(value, list | tuple):
            at = value.where if isinstance(value, Row) else where
            return Node([self.node(element, at, depth + 1) for element in value], (at,))
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UsageError(f"{where}: a number of more than 64 bits, which TOML cannot write")
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise UsageError(f"{where}: a string that UTF-8 cannot write")
        return Node(escape(value), (where,))
