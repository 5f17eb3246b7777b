"""What all conversions share: new tables as dicts of nodes, and what the schema knows of a component of ours."""

from typing import Any

from sslrun.config.importer.table import OldTable
from sslrun.config.load import committed_schema
from sslrun.config.node import Node, Origin, plain
from sslrun.config.schema_reader import classes, follow, keys, kinds

Part = dict[str, Node]


def node(value: Any, where: Origin) -> Node:
    """A value of Python as nodes that all come from one place; nodes in it stay as they are."""
    if isinstance(value, Node):
        return value
    if isinstance(value, dict):
        return Node({key: node(below, where) for key, below in value.items()}, (where,))
    if isinstance(value, list | tuple):
        return Node([node(below, where) for below in value], (where,))
    return Node(value, (where,))


def known(kind: str, name: str) -> dict[str, Any]:
    """The keys of a component of ours, by kind and class; empty where there is no such class."""
    schema = committed_schema()
    found = classes(kinds(schema)[kind]).get(name)
    return keys(follow(schema["$defs"], found)) if found else {}


def is_class(kind: str, name: str) -> bool:
    """Whether we have a component of this kind and name."""
    return name in classes(kinds(committed_schema())[kind])


def component(old: OldTable, kind: str, name: str, part: Part | None = None, tag: str = "type") -> Node:
    """A component of ours: what has been converted of it so far, and the keys that the old one has by the same name.

    What the old one has besides is reported.
    """
    made = {tag: node(name, old.where), **(part or {})}
    for key in known(kind, name):
        if key in old and key not in made:
            value = old.take(key)
            assert value is not None
            made[key] = value
    old.finish(f"{name} has nothing like it here")
    order = [tag, *known(kind, name)]
    return Node({key: made[key] for key in sorted(made, key=order.index)}, (old.where,))


def steps(old: OldTable, name: str, accumulation: int, is_exact: bool = True) -> Node | None:
    """A number of old iterations, one for each backward pass, as optimizer steps; `is_exact`: report rounding."""
    count = old.take(name, "a whole number")
    if count is None or accumulation == 1:
        return count
    if is_exact and count.value % accumulation:
        text = f"{count.value} iterations are {count.value / accumulation:g} steps of {accumulation}; rounded up"
        old.report.changed(count.where, (*old.key, name), text)
    return node(-(-count.value // accumulation), count.where)


def value_at(part: Part, *path: str) -> Any:
    """The plain value at a path in a new table; None where nothing is."""
    here: Any = part
    for name in path:
        here = here.value if isinstance(here, Node) else here
        here = here.get(name) if isinstance(here, dict) else None
    return plain(here) if isinstance(here, Node) else None
