"""Dicts and lists that know where in an old config they were written, and a limit on their number."""

from typing import Any

from sslrun.config.merge import kind
from sslrun.config.node import Origin
from sslrun.errors import UsageError

MAX_SIZE = 100_000  # characters of one string, elements of one list
MAX_WORK = 200_000  # expressions evaluated, and elements made, over all files


class Table(dict[str, Any]):
    """A dict that knows where it and each of its keys were written."""

    def __init__(self, where: Origin) -> None:
        super().__init__()
        self.where, self.places = where, dict[str, Origin]()

    def put(self, key: str, value: Any, where: Origin) -> None:
        self[key], self.places[key] = value, where

    def put_all(self, other: "Table") -> None:
        for key, value in other.items():
            self.put(key, value, other.places[key])


class Row(list[Any]):
    """A list that knows where it was written."""

    def __init__(self, values: Any, where: Origin) -> None:
        super().__init__(values)
        self.where = where


class Work:
    """Counts the expressions that were evaluated, and the elements that were made, over all files."""

    done = 0

    def charge(self, amount: int, where: Origin) -> None:
        """Counts work before it is done. Raises UsageError for what would be too large or take too long."""
        self.done += amount
        if amount > MAX_SIZE or self.done > MAX_WORK:
            raise UsageError(f"{where}: too large: more than {MAX_SIZE:,} elements at once or {MAX_WORK:,} in all")


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    return "None" if value is None else "a list" if isinstance(value, tuple) else kind(value)
