"""An old table from which every key is to be taken: what is left at the end is not forgotten, but reported."""

from collections.abc import Callable, Iterable
from typing import Any

from sslrun.config.importer.files import kind_of
from sslrun.config.importer.report import Report
from sslrun.config.node import Key, Node, Origin, plain

KINDS: dict[str, Callable[[Any], bool]] = {
    "a table": lambda value: isinstance(value, dict),
    "a list": lambda value: isinstance(value, list),
    "a string": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "a whole number": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "a number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}


class OldTable:
    """A table of the old configuration.

    Attributes:
        node: the table.
        key: where it stands in the old configuration.
        rest: what has not been taken yet; None of Python counts as absent.
        asked: names of all keys that were asked for, present or not.
    """

    def __init__(self, node: Node, key: Key, report: Report) -> None:
        self.node, self.key, self.report = node, key, report
        self.rest: dict[str, Node] = {part: value for part, value in node.value.items() if value.value is not None}
        self.asked: set[str] = set()

    @property
    def where(self) -> Origin:
        return self.node.where

    def __contains__(self, name: str) -> bool:
        return name in self.rest

    def peek(self, name: str) -> Any:
        """The plain value at a key that stays untaken; None where there is none."""
        return plain(self.rest[name]) if name in self.rest else None

    def take(self, name: str, kind: str = "") -> Node | None:
        """The value at a key, if there is one and it is of the kind (a word of KINDS); another kind is reported."""
        self.asked.add(name)
        node = self.rest.pop(name, None)
        if node is None or not kind or KINDS[kind](node.value):
            return node
        self.report.lost(node.where, (*self.key, name), f"expected {kind}, got {kind_of(node.value)}")
        return None

    def first(self, *names: str, kind: str = "") -> Node | None:
        """The value at the first of several names for one thing; all of them are taken."""
        found = [node for node in (self.take(name, kind) for name in names) if node is not None]
        return found[0] if found else None

    def get(self, name: str, kind: str, default: Any = None) -> Any:
        """The plain value at a key, as `take` finds it."""
        node = self.take(name, kind)
        return default if node is None else plain(node)

    def table(self, name: str) -> "OldTable | None":
        node = self.take(name, "a table")
        return None if node is None else OldTable(node, (*self.key, name), self.report)

    def tables(self, name: str) -> list["OldTable"]:
        """The tables in the list at a key; a table is a list of one."""
        node = self.take(name)
        if node is None:
            return []
        return tables_in(node, (*self.key, name), self.report)

    def type(self, tag: str = "type") -> str:
        """The class that the table names, without the package before it; empty where it names none."""
        name = self.get(tag, "a string", "")
        return name.rpartition(".")[2].rpartition("/")[2]

    def expect_type(self, why: str, *names: str) -> None:
        """Reports a class that is none of these; a table may also name none."""
        where = self.rest["type"].where if "type" in self.rest else self.where
        title = self.type()
        if title and title not in names:
            self.report.lost(where, (*self.key, "type"), f"{title}: {why}")

    def leave(self, why: str, *names: str) -> None:
        """Reports keys that change nothing here."""
        for name in names:
            node = self.take(name)
            if node is not None:
                self.report.left(node.where, (*self.key, name), why)

    def expect(self, name: str, value: Any, why: str) -> None:
        """Drops a key that says what is so here anyway; another value is reported, with `why`."""
        node = self.take(name)
        if node is not None and plain(node) != value:
            self.report.lost(node.where, (*self.key, name), why)

    def lose(self, name: str, why: str) -> None:
        """Reports one key as not converted."""
        node = self.take(name)
        if node is not None:
            self.report.lost(node.where, (*self.key, name), why)

    def finish(self, why: str, ignored: Iterable[str] = ()) -> None:
        """Reports everything that is left as not converted."""
        for name in list(self.rest):
            if name in ignored:
                del self.rest[name]
            else:
                self.lose(name, why)


def tables_in(node: Node, key: Key, report: Report) -> list[OldTable]:
    """The tables in a list, or a table as a list of one; anything else in it is reported."""
    if not isinstance(node.value, list):
        node = Node([node], node.origins)
    found = []
    for index, element in enumerate(node.value):
        if isinstance(element.value, dict):
            found.append(OldTable(element, (*key, index), report))
        elif element.value is not None:
            report.lost(element.where, (*key, index), f"expected a table, got {kind_of(element.value)}")
    return found
