"""What a schema holds: the classes of each kind, the keys of each table, and what a key asks for, in words.

Errors, explanations, lists, differences and the reference all read a schema through here, so they say the same. It is
the part of JSON Schema that `sslrun.config.schema` writes: tables, lists, scalars, enumerations, alternatives
(`anyOf`), and unions: `oneOf` with `x-tag`, the key whose value names the class.
"""

import re
from collections.abc import Callable
from typing import Any

from sslrun.config.node import Key, Node, child

Schema = dict[str, Any]

_WORDS = {
    "integer": ("a whole number", "whole numbers"),
    "number": ("a number", "numbers"),
    "boolean": ("true or false", "booleans"),
    "string": ("a string", "strings"),
    "object": ("a table", "tables"),
    "array": ("a list", "lists"),
}


def kinds(schema: Schema) -> dict[str, Schema]:
    """The union of each kind of component, by the word of `sslrun list KIND`."""
    return {name: found for name, found in schema["$defs"].items() if "x-tag" in found and name == found["title"]}


def classes(union: Schema) -> dict[str, Schema]:
    """The references to the classes of a union, by their names."""
    return {option["$ref"].rpartition(".")[2]: option for option in union["oneOf"]}


def follow(definitions: Schema, schema: Schema) -> Schema:
    """What a reference refers to; any other schema as it is."""
    return definitions[schema["$ref"].removeprefix("#/$defs/")] if "$ref" in schema else schema


def keys(table: Schema) -> dict[str, Schema]:
    """What a table takes besides the key that names its class."""
    return {name: asked for name, asked in table["properties"].items() if asked.get("enum") != [table["title"]]}


def places(schema: Schema) -> dict[str, list[Key]]:
    """Where in a recipe each definition is asked for, in its order; "N" is the place in a list, "NAME" a key
    of the user's own.

    A definition is entered where it is met first, so that what holds others of its kind is not entered for ever.
    """
    found: dict[str, list[Key]] = {}

    def visit(asked: Schema, key: Key) -> None:
        if "$ref" in asked:
            name = asked["$ref"].removeprefix("#/$defs/")
            is_new, known = name not in found, found.setdefault(name, [])
            known += [key] if key not in known else []
            asked = schema["$defs"][name] if is_new else {}
        for option in (*asked.get("anyOf", ()), *asked.get("oneOf", ())):
            visit(option, key)
        for part, below in asked.get("properties", {}).items():
            visit(below, (*key, part))
        if "items" in asked:
            visit(asked["items"], (*key, "N"))
        if isinstance(asked.get("additionalProperties"), dict):
            visit(asked["additionalProperties"], (*key, "NAME"))

    visit(schema, ())
    return found


def first_sentence(text: str) -> str:
    """What comes before a full stop (or ? or !) that a capital follows: not that of `et al. 2020`."""
    return re.split(r"(?<=[.?!])\s+(?=[A-Z])", text, maxsplit=1)[0]


def inside(table: Schema, node: Node) -> dict[str | int, Schema]:
    """What is asked of each part of a value: of what it has, in its order, then of what it could have and has not.

    `table` is what `named` gives for the value. Where the schema is silent, nothing is asked: {}.
    """
    if isinstance(node.value, list):
        return {index: table.get("items", {}) for index in range(len(node.value))}
    known, others = table.get("properties", {}), table.get("additionalProperties") or {}
    return {part: known.get(part, others) for part in {**node.value, **known}}


def named(definitions: Schema, schema: Schema, node: Node) -> Schema:
    """What is asked of one value: references followed, of alternatives the one of its kind, of a union its class."""
    found = follow(definitions, schema)
    if "anyOf" in found and isinstance(node.value, dict | list):
        kind = "object" if isinstance(node.value, dict) else "array"
        options = [follow(definitions, option) for option in found["anyOf"]]
        found = next((option for option in options if "x-tag" in option or option.get("type") == kind), found)
    if "x-tag" in found and isinstance(node.value, dict):
        tag = node.value.get(found["x-tag"])
        found = follow(definitions, classes(found).get(tag.value, {})) if tag else found
    return found


def at(schema: Schema, root: Node, key: Key) -> Schema:
    """What is asked of a key, with its description and default; the classes on the way are those of the values."""
    definitions, node, asked = schema.get("$defs", {}), root, schema
    for part in key:
        step = child(node, part)
        parts = inside(named(definitions, asked, node), node)
        part, node = step or (part, Node({}, ()))
        asked = parts.get(part, {})
    return asked


def expected(definitions: Schema, schema: Schema, link: Callable[[str], str] = str) -> str:
    """What is asked for, in words. `link` may make a link of a kind of component, or of the name of one."""
    schema = follow(definitions, schema)
    if "anyOf" in schema:
        return " or ".join(expected(definitions, option, link) for option in schema["anyOf"])
    if "enum" in schema:
        options = [f'"{option}"' if isinstance(option, str) else str(option) for option in schema["enum"]]
        return " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))
    if "x-tag" in schema:
        names = list(classes(schema))
        which = f"is {link(names[0])}" if len(names) == 1 else f"names one of the {link(schema['title'])}"
        return f"a table whose {schema['x-tag']} {which}"
    if schema.get("type") == "array" and schema.get("items"):
        inner = follow(definitions, schema["items"])
        count = f"{schema['minItems']} " if schema.get("minItems", 0) == schema.get("maxItems") else ""
        if inner.get("type") in _WORDS:
            return f"a list of {count}{_WORDS[inner['type']][1]}"
        return f"a list of {count}{expected(definitions, inner, link).replace('a table', 'tables', 1)}"
    return _WORDS[schema["type"]][0] if "type" in schema else "any value"
