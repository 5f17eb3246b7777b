"""`sslrun list`: the components of a kind, and one component with its keys, for people and as JSON."""

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from sslrun.config.dump import inline
from sslrun.config.merge import nearest
from sslrun.config.schema_reader import Schema, classes, expected, first_sentence, follow, keys, kinds
from sslrun.errors import UsageError

_COLUMN = 30  # where the types of a component's keys begin


def list_kinds(schema: Schema, width: int = 100) -> str:
    """Each kind of component with the names of its classes."""
    return _aligned({kind: ", ".join(classes(union)) for kind, union in kinds(schema).items()}, width)


def list_kind(schema: Schema, kind: str, width: int = 100) -> str:
    """The classes of a kind, each with the first sentence of its docs. Raises UsageError."""
    tables = {name: follow(schema["$defs"], option) for name, option in classes(_kind(schema, kind)).items()}
    return _aligned({name: first_sentence(table["description"]) for name, table in tables.items()}, width)


def list_component(schema: Schema, kind: str, name: str, width: int = 100) -> str:
    """The docs of a class, then its keys with what they take, their defaults and their docs. Raises UsageError."""
    table = _component(schema, kind, name)
    paragraphs = [table["description"], *filter(None, table.get("x-docs", "").split("\n\n"))]
    lines = [f"{name}, of the {kind} ({table['x-module']})"]
    for paragraph in paragraphs:
        is_laid_out = paragraph.startswith(" ")
        lines += ["", *(paragraph.splitlines() if is_laid_out else _wrapped(" ".join(paragraph.split()), width, ""))]
    return "\n".join([*lines, "", *_keys(schema["$defs"], table, width, "  ")]).rstrip()


def as_json(schema: Schema, kind: str | None = None, name: str | None = None) -> str:
    """What the other functions tell, for programs. Raises UsageError."""
    told: Any
    if kind is None:
        told = {kind: list(classes(union)) for kind, union in kinds(schema).items()}
    elif name is None:
        told = [_described(schema, kind, name) for name in classes(_kind(schema, kind))]
    else:
        table = _component(schema, kind, name)
        told = _described(schema, kind, name) | {"docs": table.get("x-docs", ""), "keys": []}
        for key, asked in keys(table).items():
            takes = {"name": key, "type": expected(schema["$defs"], asked), "required": key in table["required"]}
            told["keys"].append(takes | {part: asked[part] for part in ("default", "description") if part in asked})
    return json.dumps(told, indent=2)


def _described(schema: Schema, kind: str, name: str) -> dict[str, str]:
    table = _component(schema, kind, name)
    return {"name": name, "kind": kind, "module": table["x-module"], "description": table["description"]}


def _kind(schema: Schema, kind: str) -> Schema:
    found = kinds(schema)
    if kind not in found:
        near = nearest(kind, list(found)) or f"; there are {', '.join(found)}"
        raise UsageError(f"there is no kind of component called {kind!r}{near}")
    return found[kind]


def _component(schema: Schema, kind: str, name: str) -> Schema:
    found = classes(_kind(schema, kind))
    if name not in found:
        near = nearest(name, list(found)) or f"; `sslrun list {kind}` names them"
        raise UsageError(f"there is no {name!r} among the {kind}{near}")
    return follow(schema["$defs"], found[name])


def _keys(definitions: Schema, table: Schema, width: int, indent: str) -> Iterator[str]:
    """Each key with its default and what it takes, its docs below it, and the keys of a table that it takes."""
    for key, asked in keys(table).items():
        given = f"{indent}{key} = {inline(asked['default'])}" if "default" in asked else indent + key
        takes = expected(definitions, asked) + ("; required" if key in table["required"] else "")
        yield from _wrapped(takes, width, f"{given:<{_COLUMN - 2}}  ", " " * _COLUMN)
        yield from _wrapped(asked.get("description", ""), width, f"{indent}    ")
        inner = follow(definitions, asked.get("items", asked))
        if "properties" in inner:
            yield from _keys(definitions, inner, width, f"{indent}      ")


def _aligned(rows: dict[str, str], width: int) -> str:
    """Names, and beside them texts."""
    column = max(map(len, rows)) + 4
    return "\n".join(
        line for name, text in rows.items() for line in _wrapped(text, width, f"  {name}".ljust(column), " " * column)
    )


def _wrapped(text: str, width: int, first: str, rest: str | None = None) -> list[str]:
    """The lines of a text, begun with `first`, the further ones with `rest` or the same."""
    rest = first if rest is None else rest
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
