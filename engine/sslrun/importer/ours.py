"""Builds tables of the recipe, with the keys that the schema has for a component."""

from typing import Any

from sslrun.config.node import Node, plain
from sslrun.config.schema_reader import classes, committed_schema, follow, keys, kinds
from sslrun.importer.old import OldTable, node

# A table of the recipe: nodes, plain values that belong to the place of the old table, and None for what is not set.
Part = dict[str, Any]


def known(kind: str, name: str) -> dict[str, Any]:
    """The keys of a component, by kind and class; empty if there is no such class."""
    schema = committed_schema()
    found = classes(kinds(schema)[kind]).get(name)
    return keys(follow(schema["$defs"], found)) if found else {}


def names(kind: str) -> list[str]:
    """The names of the components of a kind."""
    return list(classes(kinds(committed_schema())[kind]))


def component(old: OldTable, kind: str, name: str, part: Part | None = None, tag: str = "type") -> Node:
    """A component: the keys that were converted so far, and those that the old table has under the same name.

    Keys that the component does not have are reported.
    """
    made = {key: value for key, value in (part or {}).items() if value is not None}
    own = known(kind, name)
    made |= old.renamed(**{key: key for key in own if key not in made})
    old.why = f"{name} has nothing like it here"
    old.notes.append(kind)
    for key in (key for key in made if key not in own):
        old.lost(old.why, key)
    return node({tag: name} | {key: made[key] for key in own if key in made}, old.where)


def value_at(part: Part | Node | None, *path: str) -> Any:
    """The plain value at a path in a new table; None where nothing is."""
    here: Any = part
    for name in path:
        here = here.value if isinstance(here, Node) else here
        here = here.get(name) if isinstance(here, dict) else None
    return plain(here) if isinstance(here, Node) else here
