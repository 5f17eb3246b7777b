"""Checks a config against a schema: unknown keys, wrong types and missing keys.

The schema is the committed schema.json, which needs no torch, or at run time the one derived from the classes
themselves, which includes a user's own components.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from sslrun.config.merge import kind, nearest
from sslrun.config.node import Key, Node, Origin, show, walk
from sslrun.config.old_names import renamed, renamed_class
from sslrun.config.schema_reader import Schema, classes, expected, follow
from sslrun.errors import UsageError

TAGS = ("type", "policy")  # keys that name the class of a table


class Problem(NamedTuple):
    """One error of a config: `str()` gives FILE:LINE: KEY: MESSAGE."""

    where: Origin
    key: Key
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {show(self.key)}: {self.message}" if self.key else f"{self.where}: {self.message}"


class _Scope(NamedTuple):
    definitions: dict[str, Schema]
    allows_custom: bool  # unknown classes may come from custom_imports


def check(root: Node, schema: Schema) -> None:
    """Raises UsageError for the first error of a whole config."""
    values = root.value
    if "epochs" in values and "max_iters" in values:
        late, early = sorted((values["epochs"].where, values["max_iters"].where), key=lambda o: -o.layer.order)
        hint = f'`_delete_ = ["epochs"]` or `_delete_ = ["max_iters"]` at the top of {late.layer.source} drops one'
        raise UsageError(f"{late}: epochs and max_iters are both set, the other at {early}; {hint}")
    imports = values.get("custom_imports")
    check_part(root, schema, (), allows_custom=imports is not None and bool(imports.value))


def check_part(node: Node, schema: Schema, key: Key, allows_custom: bool = False) -> None:
    """Raises UsageError for the first error of the value at a key, by a schema with its own `$defs`."""
    for problem in problems(node, schema, key, allows_custom):
        raise UsageError(str(problem))


def problems(node: Node, schema: Schema, key: Key = (), allows_custom: bool = False) -> Iterator[Problem]:
    """All errors of the value at a key, part by part."""
    return _problems(_Scope(schema.get("$defs", {}), allows_custom), node, schema, key)


def file_of(node: Node) -> Origin:
    """The place of a table in a file; for a table that only `--set` created, that `--set`."""
    return next((origin for origin in reversed(node.origins) if origin.line is not None), node.where)


def kept_keys(root: Node) -> list[str]:
    """A note for each table whose class a later layer changed: the inherited keys that it kept."""
    notes = []
    for key, node in walk(root):
        for tag, old, new in _changed_tags(node):
            kept = {k: v for k, v in node.value.items() if v.where.layer.order < new.layer.order}
            if kept:
                listed = ", ".join(f"{name} ({value.where})" for name, value in kept.items())
                change = f"{kind(old.raw)} was replaced by {kind(new.raw)}"
                notes.append(f"{new}: {show((*key, tag))}: {change}; kept from before: {listed}")
    return notes


def _changed_tags(table: Node) -> list[tuple[str, Origin, Origin]]:
    """If a later layer changed a table's class: the key that names the class, and the last two places that differ."""
    if not isinstance(table.value, dict):
        return []
    changes = []
    for tag in (t for t in TAGS if t in table.value):
        pairs = list(pairwise(table.value[tag].origins))
        changes += [(tag, old, new) for old, new in pairs if old.raw != new.raw][-1:]
    return changes


def _problems(scope: _Scope, node: Node, schema: Schema, key: Key) -> Iterator[Problem]:
    schema = follow(scope.definitions, schema)
    if "anyOf" in schema:
        yield from _alternatives(scope, node, schema, key)
    elif not _has_kind(scope, node, schema):
        yield Problem(node.where, key, f"expected {expected(scope.definitions, schema)}, got {kind(node.value)}")
    elif "x-tag" in schema:
        yield from _tagged(scope, node, schema, key)
    elif schema.get("type") == "object":
        yield from _table(scope, node, schema, key)
    elif schema.get("type") == "array":
        low, high = schema.get("minItems", 0), schema.get("maxItems", len(node.value))
        if not low <= len(node.value) <= high:
            got = f"a list of {len(node.value)}"
            yield Problem(node.where, key, f"expected {expected(scope.definitions, schema)}, got {got}")
        for index, element in enumerate(node.value):
            yield from _problems(scope, element, schema.get("items", {}), (*key, index))


def _alternatives(scope: _Scope, node: Node, schema: Schema, key: Key) -> Iterator[Problem]:
    fitting = [option for option in schema["anyOf"] if _has_kind(scope, node, follow(scope.definitions, option))]
    if not fitting:
        yield Problem(node.where, key, f"expected {expected(scope.definitions, schema)}, got {kind(node.value)}")
    elif all(any(_problems(scope, node, option, key)) for option in fitting):
        yield from _problems(scope, node, fitting[0], key)


def _tagged(scope: _Scope, node: Node, schema: Schema, key: Key) -> Iterator[Problem]:
    """A table that names its class."""
    tag = schema["x-tag"]
    options = classes(schema)
    if tag not in node.value:
        yield Problem(file_of(node), key, f"{tag} is missing; it names one of the {schema['title']}: {_some(options)}")
        return
    named = node.value[tag]
    if not isinstance(named.value, str):
        yield Problem(named.where, (*key, tag), f"expected the name of a class, got {kind(named.value)}")
    elif named.value in options:
        yield from _table(scope, node, follow(scope.definitions, options[named.value]), key)
    elif not scope.allows_custom:
        near = renamed_class(schema["title"], named.value) or nearest(named.value, list(options))
        near = near or f"; known: {_some(options)}"
        own = "; custom_imports makes your own classes known" if near.startswith("; known") else ""
        yield Problem(named.where, (*key, tag), f"there is no {named.value!r} among the {schema['title']}{near}{own}")


def _table(scope: _Scope, node: Node, schema: Schema, key: Key) -> Iterator[Problem]:
    """A table with known keys, or (`additionalProperties` a schema) with keys of the user's own."""
    known = schema.get("properties", {})
    others = schema.get("additionalProperties", {})
    for part, value in node.value.items():
        if part not in known and others is False:
            yield Problem(value.where, (*key, part), _unknown(node, value, schema, (*key, part)))
    for part, value in node.value.items():
        if part in known or others is not False:
            hint = _inherited(node, value, (*key, part)) if _changed_tags(node) else ""
            for problem in _problems(scope, value, known.get(part, others), (*key, part)):
                yield problem._replace(message=problem.message + hint) if problem.key == (*key, part) else problem
    for part in schema.get("required", []):
        if part not in node.value:
            title, needed = schema.get("title", "this table"), expected(scope.definitions, known[part])
            yield Problem(file_of(node), key, f"{part} is missing; {title} needs it: {needed}")


def _unknown(table: Node, value: Node, schema: Schema, key: Key) -> str:
    old_name = renamed(key, value)
    if old_name:
        return f"unknown key: {old_name}"
    part, known = str(key[-1]), list(schema["properties"])
    near = nearest(part, known) or f"; known: {_some(known)}"
    return f"unknown key of {schema.get('title', 'this table')}{near}{_inherited(table, value, key)}"


def _inherited(table: Node, value: Node, key: Key) -> str:
    """A hint if the key to blame is inherited: a later layer changed the table without setting this key."""
    if value.where.layer.order >= table.where.layer.order:
        return ""
    place = f"[{show(key[:-1])}]" if len(key) > 1 else "the top level"
    only = f'`_delete_ = ["{key[-1]}"]` only this key'
    return f"; it is inherited: `_delete_ = true` in {place} of {table.where.layer.source} drops all such keys, {only}"


def _has_kind(scope: _Scope, node: Node, schema: Schema) -> bool:
    """Whether a value is a table, list or scalar as the schema asks, whatever is inside it."""
    value = node.value
    if "enum" in schema:
        value = "inf" if isinstance(value, float) and value == math.inf else value
        return any(type(value) is type(option) and value == option for option in schema["enum"])
    match schema.get("type", "object" if "x-tag" in schema else None):
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        case "number":
            return _is_number(value)
        case "string":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
    return True


def _is_number(value: Any) -> bool:
    """Whether a float can hold the value. NaN is never valid; infinity only where the schema lists "inf"."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023


def _some(options: Any) -> str:
    listed = list(options)
    return ", ".join(listed[:8]) + (", ..." if len(listed) > 8 else "")
