"""The output of `sslrun list`: components with their keys, and the recipes that ship, as text and as JSON."""

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from sslrun.config import recipes
from sslrun.config.dump import inline
from sslrun.config.merge import nearest
from sslrun.config.schema_reader import Schema, classes, expected, first_sentence, follow, keys, kinds
from sslrun.errors import UsageError
from sslrun.started import program

_COLUMN = 30  # at which the types of keys begin


def found(schema: Schema, word: str) -> tuple[str, str | None]:
    """The kind that a word names, or the kind and the name of the component (in capitals or not) or recipe.

    Raises:
        UsageError: there is none, or several kinds have such a component.
    """
    known = kinds(schema)
    if word == "recipes" or word in known:
        return word, None
    names = [(kind, name) for kind, union in known.items() for name in classes(union)]
    places = [(kind, name) for kind, name in names if name.lower() == word.lower()]
    if len(places) > 1:
        commands = " and ".join(f"`{program()} list {kind} {name}`" for kind, name in places)
        raise UsageError(f"{word} is the name of several components: {commands} show them")
    shipped = list(recipes.names())
    if not places and word.removeprefix(recipes.PREFIX) in shipped:
        return "recipes", word
    if not places:
        near = nearest(word, ["recipes", *known, *(name for _, name in names), *shipped])
        near = near or f"; there are the kinds {', '.join(known)}, recipes"
        raise UsageError(f"there is no kind of component and no component called {word!r}{near}")
    return places[0]


def list_kinds(schema: Schema, width: int = 100) -> str:
    """Each kind of component with the names of its classes, as text."""
    return _aligned({kind: ", ".join(classes(union)) for kind, union in kinds(schema).items()}, width)


def list_kind(schema: Schema, kind: str, width: int = 100) -> str:
    """The classes of a kind, each with the first sentence of its docs. Raises UsageError."""
    tables = {name: follow(schema["$defs"], option) for name, option in classes(_kind(schema, kind)).items()}
    return _aligned({name: first_sentence(table["description"]) for name, table in tables.items()}, width)


def list_component(schema: Schema, kind: str, name: str, width: int = 100) -> str:
    """The docs of a class, then its keys with defaults, types and descriptions. Raises UsageError."""
    table = _component(schema, kind, name)
    paragraphs = [table["description"], *filter(None, table.get("x-docs", "").split("\n\n"))]
    lines = _wrapped(f"{name}, of the {kind} ({table['x-module']})", width, "")
    for paragraph in paragraphs:
        is_laid_out = paragraph.startswith(" ")
        lines += ["", *(paragraph.splitlines() if is_laid_out else _wrapped(" ".join(paragraph.split()), width, ""))]
    return "\n".join([*lines, "", *_keys(schema["$defs"], table, width, "  ")]).rstrip()


def list_recipes(name: str | None = None, width: int = 100, is_json: bool = False) -> str:
    """The recipes that ship, each with its first comment; or the text of one of them. Raises UsageError."""
    if name is not None:
        file = recipes.located(recipes.PREFIX + name.removeprefix(recipes.PREFIX))
        text = file.read_text(encoding="utf-8").rstrip("\n")
        return json.dumps({"name": name, "file": str(file), "text": text}, indent=2) if is_json else text
    rows = {known: recipes.description(known) for known in recipes.names()}
    if is_json:
        return json.dumps([{"name": known, "description": text} for known, text in rows.items()], indent=2)
    lines = [line for known, text in rows.items() for line in (f"  {known}", *_wrapped(text, width, " " * 6))]
    return "\n".join([*lines, "", f'`{program()} NAME` trains one; `extends = "sslrun:NAME"` builds on it.'])


def as_json(schema: Schema, kind: str | None = None, name: str | None = None) -> str:
    """The same information as JSON. Raises UsageError."""
    rows: Any
    if kind is None:
        rows = {kind: list(classes(union)) for kind, union in kinds(schema).items()}
    elif name is None:
        rows = [_described(schema, kind, name) for name in classes(_kind(schema, kind))]
    else:
        table = _component(schema, kind, name)
        rows = _described(schema, kind, name) | {"docs": table.get("x-docs", ""), "keys": []}
        for key, key_schema in keys(table).items():
            takes = {"name": key, "type": expected(schema["$defs"], key_schema), "required": key in table["required"]}
            rows["keys"].append(
                takes | {part: key_schema[part] for part in ("default", "description") if part in key_schema}
            )
    return json.dumps(rows, indent=2)


def _described(schema: Schema, kind: str, name: str) -> dict[str, str]:
    table = _component(schema, kind, name)
    return {"name": name, "kind": kind, "module": table["x-module"], "description": table["description"]}


def _kind(schema: Schema, kind: str) -> Schema:
    known = kinds(schema)
    if kind not in known:
        near = nearest(kind, list(known)) or f"; there are {', '.join(known)}"
        raise UsageError(f"there is no kind of component called {kind!r}{near}")
    return known[kind]


def _component(schema: Schema, kind: str, name: str) -> Schema:
    known = classes(_kind(schema, kind))
    if name not in known:
        near = nearest(name, list(known)) or f"; `{program()} list {kind}` names them"
        raise UsageError(f"there is no {name!r} among the {kind}{near}")
    return follow(schema["$defs"], known[name])


def _keys(definitions: Schema, table: Schema, width: int, indent: str) -> Iterator[str]:
    """Each key with its default, type and description, and the keys of a table that it takes."""
    for key, key_schema in keys(table).items():
        given = f"{indent}{key} = {inline(key_schema['default'])}" if "default" in key_schema else indent + key
        takes = expected(definitions, key_schema) + ("; required" if key in table["required"] else "")
        yield from _wrapped(takes, width, f"{given:<{_COLUMN - 2}}  ", " " * _COLUMN)
        yield from _wrapped(key_schema.get("description", ""), width, f"{indent}    ")
        inner = follow(definitions, key_schema.get("items", key_schema))
        if "properties" in inner:
            yield from _keys(definitions, inner, width, f"{indent}      ")


def _aligned(rows: dict[str, str], width: int) -> str:
    """A column of names and a column of wrapped texts."""
    column = max(map(len, rows)) + 4
    return "\n".join(
        line for name, text in rows.items() for line in _wrapped(text, width, f"  {name}".ljust(column), " " * column)
    )


def _wrapped(text: str, width: int, first: str, rest: str | None = None) -> list[str]:
    """A text wrapped to lines that begin with `first`, from the second on with `rest` (by default `first`)."""
    rest = first if rest is None else rest
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
