"""Tables of an old config, from which conversions take keys, and the report of everything that changed or got lost."""

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, NamedTuple

from sslrun.config.merge import kind
from sslrun.config.node import Key, Node, Origin, plain, show
from sslrun.importer.defaults import defaults, framework_of
from sslrun.importer.notes import NOTES, Note

MAX_LINE = 1000  # characters of a finding

KINDS: dict[str, Callable[[Any], bool]] = {
    "a table": lambda value: isinstance(value, dict),
    "a list": lambda value: isinstance(value, list),
    "a string": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "a whole number": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "a number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}


class Effect(StrEnum):
    """How a part of the old config was converted; effects that change the result of a training come first."""

    LOST = "not converted"
    CHANGED = "changed"
    LEFT = "left out"


class Finding(NamedTuple):
    """One part of the old config, by its place and its key there."""

    where: Origin
    key: Key
    effect: Effect
    text: str

    def line(self, effect: str = "") -> str:
        """FILE:LINE: KEY: MESSAGE, with the effect before the message where it is given."""
        parts = [str(self.where), show(self.key), effect, self.text]
        return one_line(": ".join(part for part in parts if part))


class Report:
    """The findings of one conversion."""

    def __init__(self) -> None:
        self._findings: dict[Finding, None] = {}  # each once, in order
        self.tables: list[OldTable] = []

    def finish(self) -> None:
        """Reports every key that no conversion has taken from its table."""
        for table in self.tables:
            table.finish()

    def add(self, effect: Effect, where: Origin, key: Key, text: str) -> None:
        self._findings[Finding(where._replace(raw=None), key, effect, text)] = None

    def findings(self, effect: Effect) -> list[Finding]:
        """The findings with one effect, file by file, line by line."""
        found = [finding for finding in self._findings if finding.effect is effect]
        return sorted(found, key=lambda finding: (finding.where.layer.order, finding.where.line or 0))

    def lines(self) -> list[str]:
        """All findings, those first that change what is computed."""
        return [finding.line(effect) for effect in Effect for finding in self.findings(effect)]

    def count(self) -> str:
        """The number of findings with each effect, in words."""
        return ", ".join(f"{len(self.findings(effect))} {effect}" for effect in Effect)


class OldTable:
    """A table of the old config. Reading its `type` fills in the defaults of that class in the old framework.

    Attributes:
        node: the table.
        key: where it stands in the old config.
        report: where findings go.
        framework: whose class the table names.
        rest: what has not been taken yet; None of Python counts as absent.
        notes: under what names, beside that of its place, NOTES has notes for its keys.
        why: what is reported of keys that nothing takes, where there is no note for them.
    """

    def __init__(self, node: Node, key: Key, report: Report, framework: str) -> None:
        self.node, self.key, self.report, self.framework = node, key, report, framework
        self.rest: dict[str, Node] = {part: value for part, value in node.value.items() if value.value is not None}
        self.notes: list[str] = []
        self.why = "there is nothing like it here"
        report.tables.append(self)

    @property
    def where(self) -> Origin:
        return self.node.where

    def __contains__(self, name: str) -> bool:
        return name in self.rest

    def again(self) -> "OldTable":
        """The same table with nothing taken."""
        return OldTable(self.node, self.key, self.report, self.framework)

    def peek(self, name: str) -> Any:
        """The plain value at a key that stays untaken; None if the key is absent."""
        return plain(self.rest[name]) if name in self.rest else None

    def take(self, name: str, expected: str = "") -> Node | None:
        """The value at a key, if there is one and it is of the kind (a word of KINDS); another kind is reported."""
        node = self.rest.pop(name, None)
        if node is None or not expected or KINDS[expected](node.value):
            return node
        self.lost(f"expected {expected}, got {kind(node.value)}", name, at=node)
        return None

    def first(self, *names: str, kind: str = "") -> Node | None:
        """The value at the first of several names for one thing; all of them are taken."""
        found = [node for node in (self.take(name, kind) for name in names) if node is not None]
        return found[0] if found else None

    def get(self, name: str, kind: str, default: Any = None) -> Any:
        """The plain value at a key, as `take` finds it."""
        node = self.take(name, kind)
        return default if node is None else plain(node)

    def __bool__(self) -> bool:
        """Whether the old config has the table, be it empty."""
        return bool(self.node.origins)

    def table(self, name: str) -> "OldTable":
        """The table at a key; where there is none, an empty one that is false."""
        node = self.take(name, "a table")
        return OldTable(node or Node({}, ()), (*self.key, name), self.report, self.framework)

    def tables(self, name: str) -> list["OldTable"]:
        """The tables in the list at a key; a table is a list of one."""
        node = self.take(name)
        return [] if node is None else self.tables_in(node, name)

    def tables_in(self, node: Node, *key: str | int) -> list["OldTable"]:
        """The tables in a list below this table; anything else in it is reported."""
        elements = node.value if isinstance(node.value, list) else [node]
        found = []
        for index, element in enumerate(elements):
            if isinstance(element.value, dict):
                found.append(OldTable(element, (*self.key, *key, index), self.report, self.framework))
            elif element.value is not None:
                self.lost(f"expected a table, got {kind(element.value)}", *key, index, at=element)
        return found

    def type(self) -> str:
        """The class that the table names, without the package before it; empty where it names none."""
        full = self.get("type", "a string", "")
        self.framework = framework_of(full, self.framework)
        name = full.rpartition(".")[2].rpartition("/")[2]
        self.notes.append(name)
        for key, value in defaults(self.framework, name).items():
            if key not in self.node.value:
                self.rest.setdefault(key, node(value, self.where))
        return name

    def lost(self, why: str, *key: str | int, at: Node | None = None) -> None:
        """Reports this table, or a key in it, as not converted."""
        self.report.add(Effect.LOST, (at or self.node).where, (*self.key, *key), why)

    def changed(self, why: str, *key: str | int, at: Node | None = None) -> None:
        """Reports this table, or a key in it, as converted to something else."""
        self.report.add(Effect.CHANGED, (at or self.node).where, (*self.key, *key), why)

    def expect(self, why: str, **usual: Any) -> None:
        """Takes keys and reports, with `why`, those whose value is not the one that holds here anyway."""
        for name, value in usual.items():
            node = self.take(name)
            if node is not None and plain(node) != value:
                self.lost(why, name, at=node)

    def leave(self, why: str, name: str) -> None:
        """Reports a key that changes nothing here."""
        node = self.take(name)
        if node is not None:
            self.report.add(Effect.LEFT, node.where, (*self.key, name), why)

    def finish(self) -> None:
        """Reports what is left of the table, as NOTES says of each key."""
        place = next((part for part in reversed(self.key) if isinstance(part, str)), "")
        for name, value in self.rest.items():
            found = [NOTES[owner][name] for owner in (*self.notes, place) if name in NOTES.get(owner, {})]
            if found or name not in NOTES or not isinstance(value.value, dict):
                self._report(name, value, found[0] if found else Note())
            else:
                OldTable(value, (*self.key, name), self.report, self.framework)  # which has its own turn
        self.rest.clear()

    def _report(self, name: str, value: Node, note: Note) -> None:
        given = plain(value)
        if note.is_left:
            self.report.add(Effect.LEFT, value.where, (*self.key, name), note.why)
        elif isinstance(note.usual, tuple):
            title = str(given).rpartition(".")[2]
            if title not in note.usual:
                self.lost(f"{title}: {note.why}" if name == "type" else note.why, name, at=value)
        elif not note.is_silent and (note.usual is None or given != note.usual):
            self.lost(note.why or self.why, name, at=value)

    def renamed(self, **names: str) -> dict[str, Node]:
        """Takes the values at old names, and returns them by their names here (`ours="old"`)."""
        return {ours: self.rest.pop(name) for ours, name in names.items() if name in self.rest}

    def give_up(self, why: str) -> None:
        """Reports this table as a whole as not converted."""
        self.lost(why)
        self.rest.clear()


def node(value: Any, where: Origin) -> Node:
    """A value of Python as nodes that all come from one place; nodes in it stay as they are."""
    if isinstance(value, Node):
        return value
    if isinstance(value, dict):
        return Node({key: node(below, where) for key, below in value.items()}, (where,))
    if isinstance(value, list | tuple):
        return Node([node(below, where) for below in value], (where,))
    return Node(value, (where,))


def walk_types(node: Node) -> Iterator[str]:
    """Every `type` in a tree, as written."""
    below = node.value.values() if isinstance(node.value, dict) else node.value if isinstance(node.value, list) else ()
    title = node.value.get("type") if isinstance(node.value, dict) else None
    if title is not None and isinstance(title.value, str):
        yield title.value
    for inner in below:
        yield from walk_types(inner)


def one_line(text: str) -> str:
    """A text that can stand in a comment, whatever it came from: one line, no control characters, not too long."""
    text = text if len(text) <= MAX_LINE else f"{text[:MAX_LINE]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)
