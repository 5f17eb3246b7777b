"""Derives the schema for editors from the schema of whole configs.

An editor sees one file, before anything is merged or resolved. So no key is required, since a base may set it; any
value may be a string with a reference; a list may be a table that edits its elements; every table may have `_delete_`;
and a table that names a user's own class may hold anything. Names and types of keys remain to be checked. A table that
leaves its class to a base may hold the keys of any shipped class of its kind.

Errors should point at the wrong key, so alternatives are distinguished by `if`: for `anyOf`, editors only say that
nothing matched. But editors take completions from `anyOf`, so a union has one beside its `if`, which accepts anything.
"""

from sslrun.config.recipes import FOLDER
from sslrun.config.schema_reader import Schema, classes, follow, keys

EDITOR_PATH = (FOLDER / "editor.schema.json").resolve()
"""The schema for editors, wherever sslrun is installed."""

_INDEX = "^(0|[1-9][0-9]*)$"
_REFERENCE: Schema = {"$ref": "#/$defs/reference"}
_DELETE: Schema = {"$ref": "#/$defs/_delete_"}
_OWN_DEFINITIONS: Schema = {
    "reference": {"type": "string", "pattern": r"\$\{"},
    "_delete_": {
        "type": ["boolean", "array"],
        "items": {"type": "string"},
        "description": "inherited keys to drop: true for all of the table, or a list.",
    },
    "extends": {
        "type": ["string", "array"],
        "items": {"type": "string"},
        "description": "the file or files that this one inherits from; paths are relative to this file's folder.",
    },
}


def editor_schema(schema: Schema) -> Schema:
    """The schema of one file, derived from the schema of whole configs."""
    definitions = dict(_OWN_DEFINITIONS)
    for name, definition in schema["$defs"].items():
        definitions[name] = _union(definition, schema["$defs"]) if "x-tag" in definition else _table(definition)
    recipe = definitions[schema["$ref"].removeprefix("#/$defs/")]
    recipe["properties"] = {"extends": {"$ref": "#/$defs/extends"}, **recipe["properties"]}
    # Draft 7 is the one that editors know best.
    return {"$schema": "http://json-schema.org/draft-07/schema#", "$ref": schema["$ref"], "$defs": definitions}


def _table(definition: Schema) -> Schema:
    """A table with these keys. A class is described at the key that names it."""
    described = {} if "x-module" in definition else {"description": definition["description"]}
    return (
        described
        | _or_reference("object")
        | _only({key: _value(schema) for key, schema in definition["properties"].items()})
    )


def _union(definition: Schema, definitions: Schema) -> Schema:
    """A table of the class that it names, of a user's own class, or of a class that a base names."""
    tag, options = definition["x-tag"], classes(definition)
    named: Schema = {"properties": {tag: {"type": "string"}}}
    for name, option in reversed(options.items()):
        named = {"if": {"properties": {tag: {"enum": [name]}}}, "then": option, "else": named}
    inherited: dict[str, dict[str, Schema]] = {}
    for option in options.values():
        for key, schema in keys(follow(definitions, option)).items():
            inherited.setdefault(key, {}).setdefault(*_of_any_class(schema, f"{option['$ref']}/properties/{key}"))
    of_any = {key: [*values.values()] for key, values in inherited.items()}
    return {
        "description": f"one of the {definition['title']}: {', '.join(options)}",
        **_or_reference("object"),
        "anyOf": [{}, *options.values()],  # {} accepts everything, and validators stop at it
        "if": {"required": [tag]},
        "then": named,
        "else": _only({key: values[0] if len(values) == 1 else {"anyOf": values} for key, values in of_any.items()}),
    }


def _of_any_class(schema: Schema, place: str) -> tuple[str, Schema]:
    """The schema of a key in a table whose class is unknown, preceded by a text that identifies equal schemas.

    A table that must be of one class of a kind may be of any class of it, since its own class may be inherited too.
    """
    if "$ref" in schema:
        kind = schema["$ref"].partition(":")[0]
        return kind, {"$ref": kind}
    bare = {key: below for key, below in schema.items() if key not in ("description", "default")}
    return repr(bare), {"$ref": place}


def _value(schema: Schema) -> Schema:
    """What one file may write for a value of the whole config."""
    described = {key: schema[key] for key in ("description", "default") if key in schema}
    bare = {key: below for key, below in schema.items() if key not in described}
    if bare in ({}, {"type": "string"}) or "$ref" in bare:  # tables allow references themselves
        return described | bare
    if bare.get("type") == "array":
        items = _value(bare.get("items", {}))
        edits = {"patternProperties": {_INDEX: items, "^_delete_$": _DELETE}, "additionalProperties": False}
        return described | bare | _or_reference("array", "object") | {"items": items} | edits
    if bare.get("type") == "object":
        return described | _or_reference("object") | {"additionalProperties": _value(bare["additionalProperties"])}
    if "type" in bare:
        return described | {"type": [bare["type"], "string"], "if": _REFERENCE, "else": bare}
    if "enum" in bare:
        return {"anyOf": [described | bare, _REFERENCE], "if": _REFERENCE, "else": bare}
    first, *others = bare["anyOf"]
    return {"anyOf": [_value(described | first), *map(_value, others)]}


def _or_reference(*types: str) -> Schema:
    """One of these types, or a string with a reference."""
    return _OWN_DEFINITIONS["reference"] | {"type": [*types, "string"]}


def _only(properties: Schema) -> Schema:
    """These keys and `_delete_`, and no others."""
    return {"properties": {**properties, "_delete_": _DELETE}, "additionalProperties": False}
