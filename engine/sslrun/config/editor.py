"""The schema that editors hold a recipe against, made of the one for whole configurations.

An editor sees one file, before anything is merged or resolved. So nothing is required, since a base may give it; any
value may be a text with a reference; a list may be a table that edits its elements; every table may have `_delete_`;
and a table that names a class of one's own may hold anything. What remains is the names and the types of keys. A table
that leaves its class to a base may hold what any class of its kind that ships may.

Errors are to point at the key that is wrong, so alternatives are told apart by `if`: of `anyOf` editors only say that
nothing fitted. But completions are made of `anyOf`, so it stands beside the `if` of a union, accepting everything.
"""

from sslrun.config.schema_reader import Schema, classes, follow, keys

_INDEX = "^(0|[1-9][0-9]*)$"
_REFERENCE: Schema = {"$ref": "#/$defs/reference"}
_DELETE: Schema = {"$ref": "#/$defs/_delete_"}
_OWN_DEFINITIONS: Schema = {
    "reference": {"type": "string", "pattern": r"\$\{"},
    "_delete_": {
        "type": ["boolean", "array"],
        "items": {"type": "string"},
        "description": "what is inherited and shall not stay: true for all of this table, or a list of its keys.",
    },
    "extends": {
        "type": ["string", "array"],
        "items": {"type": "string"},
        "description": "the file, or files, that this one goes over; paths start from this file's folder.",
    },
}


def editor_schema(schema: Schema) -> Schema:
    """The schema of one file, of that of whole configurations."""
    definitions = dict(_OWN_DEFINITIONS)
    for name, found in schema["$defs"].items():
        definitions[name] = _union(found, schema["$defs"]) if "x-tag" in found else _table(found)
    recipe = definitions[schema["$ref"].removeprefix("#/$defs/")]
    recipe["properties"] = {"extends": {"$ref": "#/$defs/extends"}, **recipe["properties"]}
    # Draft 7 is the one that editors know best.
    return {"$schema": "http://json-schema.org/draft-07/schema#", "$ref": schema["$ref"], "$defs": definitions}


def _table(found: Schema) -> Schema:
    """A table of certain keys. A class is described at the key that names it."""
    described = {} if "x-module" in found else {"description": found["description"]}
    return (
        described | _or_reference("object") | _only({key: _value(asked) for key, asked in found["properties"].items()})
    )


def _union(found: Schema, definitions: Schema) -> Schema:
    """A table of the class that it names, of a class of one's own, or of one that a base names."""
    tag, options = found["x-tag"], classes(found)
    named: Schema = {"properties": {tag: {"type": "string"}}}
    for name, option in reversed(options.items()):
        named = {"if": {"properties": {tag: {"enum": [name]}}}, "then": option, "else": named}
    inherited: dict[str, dict[str, Schema]] = {}
    for option in options.values():
        for key, asked in keys(follow(definitions, option)).items():
            inherited.setdefault(key, {}).setdefault(*_of_any_class(asked, f"{option['$ref']}/properties/{key}"))
    of_any = {key: [*values.values()] for key, values in inherited.items()}
    return {
        "description": f"one of the {found['title']}: {', '.join(options)}",
        **_or_reference("object"),
        "anyOf": [{}, *options.values()],  # nothing is tried after what accepts everything
        "if": {"required": [tag]},
        "then": named,
        "else": _only({key: values[0] if len(values) == 1 else {"anyOf": values} for key, values in of_any.items()}),
    }


def _of_any_class(asked: Schema, place: str) -> tuple[str, Schema]:
    """What a key takes whose class is not known: as a text to compare, and as a schema.

    A table that must be of one class of a kind may be of any, as it may be inherited too.
    """
    if "$ref" in asked:
        kind = asked["$ref"].partition(":")[0]
        return kind, {"$ref": kind}
    bare = {key: below for key, below in asked.items() if key not in ("description", "default")}
    return repr(bare), {"$ref": place}


def _value(asked: Schema) -> Schema:
    """What a file may write where a configuration has a value."""
    told = {key: asked[key] for key in ("description", "default") if key in asked}
    bare = {key: below for key, below in asked.items() if key not in told}
    if bare in ({}, {"type": "string"}) or "$ref" in bare:  # tables see to references themselves
        return told | bare
    if bare.get("type") == "array":
        items = _value(bare.get("items", {}))
        edits = {"patternProperties": {_INDEX: items, "^_delete_$": _DELETE}, "additionalProperties": False}
        return told | bare | _or_reference("array", "object") | {"items": items} | edits
    if bare.get("type") == "object":
        return told | _or_reference("object") | {"additionalProperties": _value(bare["additionalProperties"])}
    if "type" in bare:
        return told | {"type": [bare["type"], "string"], "if": _REFERENCE, "else": bare}
    if "enum" in bare:
        return {"anyOf": [told | bare, _REFERENCE], "if": _REFERENCE, "else": bare}
    first, *others = bare["anyOf"]
    return {"anyOf": [_value(told | first), *map(_value, others)]}


def _or_reference(*types: str) -> Schema:
    """One of these types, or a text with a reference."""
    return _OWN_DEFINITIONS["reference"] | {"type": [*types, "string"]}


def _only(properties: Schema) -> Schema:
    """These keys and `_delete_`, no others."""
    return {"properties": {**properties, "_delete_": _DELETE}, "additionalProperties": False}
