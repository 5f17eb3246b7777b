"""Builds tables of the recipe: dicts of nodes, with the keys that the schema has for a component."""

from typing import Any

from sslrun.config.node import Node, plain
from sslrun.config.schema_reader import classes, committed_schema, follow, keys, kinds
from sslrun.importer.old import OldTable, node

Part = dict[str, Node]


def present(**values: Node | None) -> Part:
    """The values that there are, by their keys."""
    return {key: value for key, value in values.items() if value is not None}


def known(kind: str, name: str) -> dict[str, Any]:
    """The keys of a component, by kind and class; empty if there is no such class."""
    schema = committed_schema()
    found = classes(kinds(schema)[kind]).get(name)
    return keys(follow(schema["$defs"], found)) if found else {}


def is_class(kind: str, name: str) -> bool:
    """Whether the schema has a component of this kind and name."""
    return name in classes(kinds(committed_schema())[kind])


def component(old: OldTable, kind: str, name: str, part: Part | None = None, tag: str = "type") -> Node:
    """A component: the keys that were converted so far, and those that the old table has under the same name.

    Keys that the component does not have are reported.
    """
    made = {tag: node(name, old.where), **(part or {})}
    own = known(kind, name)
    for key in own:
        if key in old and key not in made:
            made[key] = old.rest.pop(key)
    old.why = f"{name} has nothing like it here"
    old.notes.append(kind)
    for key in [key for key in made if key not in (tag, *own)]:
        old.lost(old.why, key, at=made.pop(key))
    order = [tag, *own]
    return Node({key: made[key] for key in sorted(made, key=order.index)}, (old.where,))


def steps(old: OldTable, name: str, accumulation: int, is_exact: bool = True) -> Node | None:
    """Converts iterations, which are backward passes, to optimizer steps; `is_exact` reports rounding.

    Args:
        old: the table that has them.
        name: the key of a number or of a list of numbers.
        accumulation: backward passes for one optimizer step.
        is_exact: whether a number that is rounded is reported.
    """
    count = old.take(name, "" if isinstance(old.peek(name), list) else "a whole number")
    if count is None or accumulation == 1:
        return count
    found = []
    is_list = isinstance(count.value, list)
    for index, number in enumerate(count.value if is_list else [count]):
        found.append(number)
        if isinstance(number.value, int):
            found[-1] = node(-(-number.value // accumulation), number.where)
            if is_exact and number.value % accumulation:
                exact = f"{number.value / accumulation:g} steps of {accumulation}"
                old.changed(
                    f"{number.value} iterations are {exact}; rounded up",
                    *((name, index) if is_list else (name,)),
                    at=number,
                )
    return Node(found, count.origins) if is_list else found[0]


def value_at(part: Part | Node | None, *path: str) -> Any:
    """The plain value at a path in a new table; None where nothing is."""
    here: Any = part
    for name in path:
        here = here.value if isinstance(here, Node) else here
        here = here.get(name) if isinstance(here, dict) else None
    return plain(here) if isinstance(here, Node) else None
