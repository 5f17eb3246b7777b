"""What an old configuration is made of while it is being read.

Python's own lists and dicts, so that two names for one object stay one object, each of which knows where it was
written; and what could not be evaluated, as a value of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from sslrun.config.dump import escape
from sslrun.config.node import Key, Layer, Node, Origin
from sslrun.errors import UsageError

DELETE = "_delete_"

MAX_DEPTH = 64  # of tables and lists in each other; as in TOML files
MAX_SIZE = 100_000  # characters of one string, elements of one list
MAX_BITS = 4096  # of a whole number on the way; what is written at last has at most 64
MAX_WORK = 200_000  # evaluations, and elements and characters made

Scalar = bool | int | float | str | None


@dataclass(frozen=True)
class Unknown:
    """A value that could not be evaluated: the text that was to be, and why not."""

    where: Origin
    text: str
    reason: str


class CannotEvaluate(Exception):
    """An expression has no value here. It ends where a value would be kept: in a key, a list or a name."""

    def __init__(self, unknown: Unknown) -> None:
        self.unknown = unknown


class Numbers(dict[Key, int]):
    """The lines of a file whose keys are the numbers of its lines: the layers of old configurations have it."""

    def get(self, key: Key, default: Any = None) -> Any:
        return key[0]


def at_line(layer: Layer, number: int) -> Origin:
    """A place in an old configuration."""
    return Origin(layer, (number,), None)


class Table(dict[Any, Any]):
    """A dict that knows its place and the places of its keys. `spoilt`: something may have changed it, unseen."""

    def __init__(self, where: Origin) -> None:
        super().__init__()
        self.where = where
        self.places: dict[Any, Origin] = {}
        self.spoilt: Unknown | None = None

    def put(self, key: Any, value: Any, where: Origin) -> None:
        self[key] = value
        self.places[key] = where

    def place(self, key: Any) -> Origin:
        return self.places.get(key, self.where)

    def take_over(self, other: "Table") -> None:
        for key, value in other.items():
            self.put(key, value, other.place(key))


class Row(list[Any]):
    """A list that knows its place."""

    def __init__(self, values: Any, where: Origin) -> None:
        super().__init__(values)
        self.where = where
        self.spoilt: Unknown | None = None


class Work:
    """How much has been done, over all files; more than is allowed ends the reading."""

    def __init__(self) -> None:
        self.done = 0

    def charge(self, amount: int, where: Origin) -> None:
        """Counts work that is about to be done. Raises UsageError instead of beginning what would be too much."""
        if amount > MAX_SIZE:
            raise UsageError(f"{where}: makes more than {MAX_SIZE:,} elements or characters at once")
        self.done += amount
        if self.done > MAX_WORK:
            raise UsageError(f"{where}: takes too long: more than {MAX_WORK:,} steps, elements and characters")


def spoil(value: Any, unknown: Unknown, work: Work) -> None:
    """Marks all containers in a value: something that was not evaluated may have changed them."""
    waiting = [value]
    while waiting:
        here = waiting.pop()
        work.charge(1, unknown.where)
        if isinstance(here, Table | Row):
            if here.spoilt is not None:
                continue
            here.spoilt = unknown
        if isinstance(here, Table | Row | tuple):
            waiting += inside(here)


def inside(value: Any) -> list[Any]:
    """The values of a dict, the elements of a list."""
    return list(value.values()) if isinstance(value, dict) else list(value)


class Wrapping(NamedTuple):
    """From values to nodes, with what had to be left out on the way, and why, by key."""

    work: Work
    lost: list[tuple[Key, Unknown]]

    def node(self, value: Any, where: Origin, key: Key = ()) -> Node | None:
        """A value as nodes: `_delete_` gone, None kept as a value; None where nothing of it can be kept."""
        self.work.charge(1, where)
        if len(key) > MAX_DEPTH:
            raise UsageError(f"{where}: tables or lists nested more than {MAX_DEPTH} deep")
        if isinstance(value, Unknown):
            self.lost.append((key, value))
            return None
        if isinstance(value, Table | Row) and value.spoilt is not None:
            self.lost.append((key, value.spoilt))
            return None
        reason = unwritable(value)
        if reason:
            self.lost.append((key, Unknown(where, "", reason)))
            return None
        if isinstance(value, Table):
            return Node(dict(self._pairs(value, key)), (value.where,))
        if isinstance(value, Row | tuple):
            at = value.where if isinstance(value, Row) else where
            nodes = [self.node(element, at, (*key, index)) for index, element in enumerate(value)]
            return Node([node for node in nodes if node is not None], (at,))
        return Node(escape(value), (where,))

    def _pairs(self, table: Table, key: Key) -> Iterator[tuple[str, Node]]:
        for part, value in table.items():
            where = table.place(part)
            if part == DELETE:
                continue
            reason = unwritable(part) if isinstance(part, str) else "is no string, but a key of TOML is"
            if reason:
                self.lost.append((key, Unknown(where, repr(part)[:40], reason)))
                continue
            node = self.node(value, where, (*key, part))
            if node is not None:
                yield part, node


def unwritable(value: Any) -> str:
    """Why a scalar cannot be written in TOML; empty where it can."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "is larger than a whole number of TOML can be"
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        return "has characters that UTF-8 cannot write"
    return ""
