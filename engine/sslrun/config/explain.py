"""A configuration as text: printed whole, or one key with the places that set it."""

from collections.abc import Iterator
from typing import Any

from sslrun.config.check import Schema
from sslrun.config.interpolate import escape, references
from sslrun.config.load import Config, as_key, committed_schema
from sslrun.config.merge import nearest
from sslrun.config.node import Key, Node, child, lookup, parse_key, plain, show
from sslrun.errors import UsageError


def dump(values: dict[str, Any]) -> str:
    """Values as TOML that `load` reads back as the same values: a literal `${` is written `$${`."""
    return "\n".join(_table(escape(values), ())).lstrip("\n") + "\n"


def _table(table: dict[str, Any], key: Key) -> Iterator[str]:
    """The lines of one table: what fits on a line first, then its own tables and lists of tables."""
    below = {part: value for part, value in table.items() if _is_section(value)}
    for part, value in table.items():
        if part not in below:
            yield f"{show((part,))} = {inline(value)}"
    for part, value in below.items():
        header = show((*key, part))
        for section in value if isinstance(value, list) else [value]:
            yield from ("", f"[[{header}]]" if isinstance(value, list) else f"[{header}]")
            yield from _table(section, (*key, part))


def _is_section(value: Any) -> bool:
    """Whether a value is written with headers of its own: a table, or a list of nothing but tables."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(element, dict) for element in value)
    return isinstance(value, dict)


def explain(config: Config, key: str, schema: Schema | None = None) -> str:
    """The value at a key, what it means, and a line for each place that set it, outermost last.

    Below a place that refers to other keys stand, indented, the places that set those. A key that nothing sets is
    explained by the schema. Raises UsageError for a key that does not exist.
    """
    parts = as_key(key)
    schema = committed_schema() if schema is None else schema
    described = _schema_at(config.root, schema, parts)
    meaning = [f"  # {described['description']}"] if "description" in described else []
    node = lookup(config.root, parts)
    if node is None:
        if not described:
            raise UsageError(f"{show(parts)}: there is no such key{_hint(config.root, schema, parts)}")
        value = f" = {inline(described['default'])}" if "default" in described else ""
        return "\n".join([f"{show(parts)}{value}", *meaning, f"  {'default of the code' if value else 'not set'}"])
    value = f"{show(parts)} = {inline(plain(node))}" if parts else dump(config.values).rstrip()
    return "\n".join([value, *meaning, *_places(config.root, node, "  ")])


def inline(value: Any) -> str:
    """Any value on one line of TOML."""
    import tomli_w

    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inline, value))}]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{show((key,))} = {inline(below)}" for key, below in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


def _hint(root: Node, schema: Schema, key: Key) -> str:
    """The nearest name to the first part of a key that nothing knows."""
    for end, part in enumerate(key):
        if lookup(root, key[: end + 1]) is None and not _schema_at(root, schema, key[: end + 1]):
            return nearest(str(part), list(_schema_at(root, schema, key[:end]).get("properties", {})))
    return ""


def _places(root: Node, node: Node, indent: str) -> list[str]:
    lines = []
    for origin in node.origins:
        written = "" if isinstance(origin.raw, dict | list) else f"  {inline(origin.raw)}"
        lines.append(f"{indent}{origin}{written if origin.line is not None else ''}")
    raw = node.where.raw
    for target in references(raw) if isinstance(raw, str) else []:
        lines.append(f"{indent}  ${{{target}}}")
        referred = lookup(root, parse_key(target))
        assert referred is not None  # it was resolved
        lines += _places(root, referred, indent + "    ")
    return lines


def _schema_at(root: Node, schema: Schema, key: Key) -> Schema:
    """What the schema says of a key, following the classes that the configuration names; empty where it is silent."""
    definitions, node = schema.get("$defs", {}), root
    here = _named(schema, root, definitions)
    for part in key:
        step = child(node, part)
        node = step[1] if step else Node({}, ())
        is_element = str(part).isdigit() and "items" in here
        here = here["items"] if is_element else here.get("properties", {}).get(str(part), {})
        here = _named(here, node, definitions)
    return here


def _named(schema: Schema, node: Node, definitions: dict[str, Schema]) -> Schema:
    """A reference replaced by what it names, a union by the class that the table names."""
    found = definitions[schema["$ref"].removeprefix("#/$defs/")] if "$ref" in schema else schema
    if "x-tag" in found and isinstance(node.value, dict) and found["x-tag"] in node.value:
        options = {option["$ref"].rpartition(".")[2]: option for option in found["oneOf"]}
        named = options.get(node.value[found["x-tag"]].value)
        found = definitions[named["$ref"].removeprefix("#/$defs/")] if named else {}
    return found | {key: schema[key] for key in ("description", "default") if key in schema}
