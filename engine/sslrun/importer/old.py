"""Tables of an old config, from which conversions take keys, and the report of everything that changed or got lost."""

from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple

from sslrun.config.merge import kind
from sslrun.config.node import Key, Node, Origin, lookup, plain, show
from sslrun.importer.defaults import DEFAULTS, framework_of
from sslrun.importer.notes import LEFT, PLACES, USUAL, WHY

MAX_LINE = 1000  # characters of a finding

KINDS: dict[str, Callable[[Any], bool]] = {
    "a table": lambda value: isinstance(value, dict),
    "a list": lambda value: isinstance(value, list),
    "a string": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "a whole number": lambda value: isinstance(value, int) and not isinstance(value, bool),
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
    """The findings of one conversion.

    Attributes:
        accumulation: backward passes for one optimizer step, of which iterations of the old config are one each.
        tables: all tables that were opened; `finish` reports what is left in them.
    """

    def __init__(self) -> None:
        self._findings: dict[Finding, None] = {}  # each once, in order
        self.accumulation = 1
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
        return sorted(found, key=lambda finding: (finding.where.layer[:2], finding.where.line or 0))

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
        notes: under what names, beside that of its place, there are notes for its keys.
        why: what is reported of keys that nothing takes, where there is no note for them.
        is_there: whether the old config has the table. What is reported of one that it has not is in the place of the
            table around it.
    """

    def __init__(self, node: Node, key: Key, report: Report, framework: str, is_there: bool = True) -> None:
        self.node, self.key, self.report, self.framework, self.is_there = node, key, report, framework, is_there
        self.rest: dict[str, Node] = {part: value for part, value in node.value.items() if value.value is not None}
        self.notes: list[str] = []
        self.why = "there is nothing like it here"
        report.tables.append(self)

    def __bool__(self) -> bool:
        """Whether the old config has the table, be it empty."""
        return self.is_there

    def __contains__(self, name: str) -> bool:
        return name in self.rest

    @property
    def where(self) -> Origin:
        return self.node.where

    def peek(self, name: str) -> Any:
        """The plain value at a key that stays untaken; None if the key is absent."""
        return plain(self.rest[name]) if name in self.rest else None

    def take(self, name: str, expected: str = "") -> Node | None:
        """The value at a key, if there is one and it is of the kind (a word of KINDS); another kind is reported."""
        node = self.rest.pop(name, None)
        if node is None or not expected or KINDS[expected](node.value):
            return node
        self.lost(f"expected {expected}, got {kind(node.value)}", name)
        return None

    def first(self, *names: str, kind: str = "") -> Node | None:
        """The value at the first of several names for one thing; all of them are taken."""
        found = [node for node in (self.take(name, kind) for name in names) if node is not None]
        return found[0] if found else None

    def get(self, name: str, kind: str = "", default: Any = None) -> Any:
        """The plain value at a key, as `take` finds it."""
        node = self.take(name, kind)
        return default if node is None else plain(node)

    def renamed(self, **names: str) -> dict[str, Node]:
        """Takes the values at old names, and returns them by their names here (`ours="old"`)."""
        return {ours: self.rest.pop(name) for ours, name in names.items() if name in self.rest}

    def steps(self, name: str, is_exact: bool = True) -> Node | None:
        """Takes a number of iterations, or a list of them, as optimizer steps; `is_exact` reports rounding."""
        count = self.take(name, "" if isinstance(self.peek(name), list) else "a whole number")
        passes = self.report.accumulation
        if count is None or passes == 1:
            return count
        found = []
        for index, number in enumerate(count.value if isinstance(count.value, list) else [count]):
            is_whole = KINDS["a whole number"](number.value)
            found.append(number._replace(value=-(-number.value // passes)) if is_whole else number)
            if is_whole and is_exact and number.value % passes:
                exact = f"{number.value} iterations are {number.value / passes:g} steps of {passes}; rounded up"
                self.changed(exact, *((name, index) if isinstance(count.value, list) else (name,)))
        return count._replace(value=found) if isinstance(count.value, list) else found[0]

    def table(self, name: str) -> "OldTable":
        """The table at a key; where there is none, an empty one that is false."""
        node = self.take(name, "a table")
        found = Node({}, self.node.origins) if node is None else node
        return OldTable(found, (*self.key, name), self.report, self.framework, node is not None)

    def tables(self, name: str) -> list["OldTable"]:
        """The tables in the list at a key; a table is a list of one."""
        node = self.take(name)
        return [] if node is None else self.tables_in(node, name)

    def tables_in(self, node: Node, *key: str | int, of: slice = slice(None)) -> list["OldTable"]:
        """The tables in a part of a list below this table; anything else in it is reported."""
        elements = node.value if isinstance(node.value, list) else [node]
        found = []
        for index, element in list(enumerate(elements))[of]:
            if isinstance(element.value, dict):
                found.append(OldTable(element, (*self.key, *key, index), self.report, self.framework))
            elif element.value is not None:
                self.lost(f"expected a table, got {kind(element.value)}", *key, index)
        return found

    def type(self) -> str:
        """The class that the table names, without the package before it; empty where it names none."""
        full = self.get("type", "a string", "")
        self.framework = framework_of(full, self.framework)
        name = full.rpartition(".")[2].rpartition("/")[2]
        self.notes.append(name)
        for key, value in DEFAULTS.get((self.framework, name), {}).items():
            if key not in self.node.value:
                self.rest.setdefault(key, node(value, self.where))
        return name

    def lost(self, why: str, *key: str | int) -> None:
        """Reports this table, or a key in it, as not converted."""
        self._add(Effect.LOST, why, key)

    def changed(self, why: str, *key: str | int) -> None:
        """Reports this table, or a key in it, as converted to something else."""
        self._add(Effect.CHANGED, why, key)

    def give_up(self, why: str, effect: Effect = Effect.LOST) -> None:
        """Reports this table as a whole, and no key in it."""
        self._add(effect, why, ())
        self.rest.clear()

    def leave(self, why: str, *names: str) -> None:
        """Takes keys that change nothing here, and reports them as left out."""
        for name in names:
            if self.take(name) is not None:
                self._add(Effect.LEFT, why, (name,))

    def expect(self, why: str, **usual: Any) -> None:
        """Takes keys and reports, with `why`, those whose value is not the one that holds here anyway."""
        for name, value in usual.items():
            node = self.take(name)
            if node is not None and plain(node) != value:
                self.lost(why, name)

    def finish(self) -> None:
        """Reports what is left of the table, as the notes say of each key."""
        place = next((part for part in reversed(self.key) if isinstance(part, str)), "top")
        for name, value in list(self.rest.items()):
            owners = [(owner, name) for owner in (*self.notes, place)]
            left, usual, why = (next((t[o] for o in owners if o in t), None) for t in (LEFT, USUAL, WHY))
            given = value.value.rpartition(".")[2] if isinstance(value.value, str) else plain(value)
            is_usual = left == "" or given in (usual if isinstance(usual, tuple) else (usual,))
            if left:
                self.leave(left, name)
            elif usual is None and why is None and name in PLACES and isinstance(value.value, dict):
                OldTable(value, (*self.key, name), self.report, self.framework)  # which has its own turn
            elif not is_usual:
                self.lost(f"{given}: {why or self.why}" if name == "type" else why or self.why, name)
        self.rest.clear()

    def _add(self, effect: Effect, why: str, key: Key) -> None:
        found = (lookup(self.node, key[:length]) for length in range(len(key), 0, -1))
        at = next((node for node in found if node is not None), self.node)
        self.report.add(effect, at.where, (*self.key, *key), why)


def node(value: Any, where: Origin) -> Node:
    """A value of Python as nodes that all come from one place; nodes in it stay as they are."""
    if isinstance(value, Node):
        return value
    if isinstance(value, dict):
        return Node({key: node(below, where) for key, below in value.items()}, (where,))
    if isinstance(value, list | tuple):
        return Node([node(below, where) for below in value], (where,))
    return Node(value, (where,))


def one_line(text: str) -> str:
    """A text that can stand in a comment, whatever it came from: one line, no control characters, not too long."""
    text = text if len(text) <= MAX_LINE else f"{text[:MAX_LINE]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)
