"""Explains one key or all keys: the value, its meaning and the places that set it."""

import textwrap
from collections.abc import Iterator
from itertools import pairwise

from sslrun.config.dump import inline, is_section, laid_out
from sslrun.config.interpolate import references
from sslrun.config.load import Config
from sslrun.config.merge import nearest
from sslrun.config.node import Key, Node, as_key, lookup, parse_key, plain, show
from sslrun.config.schema_reader import Schema, Setting, at, committed_schema, named, parts
from sslrun.errors import UsageError

DEFAULT, UNSET = "default of the code", "not set"


def explain(config: Config, key: str, schema: Schema | None = None, width: int = 100) -> str:
    """The value at a key, its meaning, and a line for each place that set it, in merge order.

    If a place refers to other keys, the places that set those follow, indented. A key that is not set is explained by
    the schema. Raises UsageError for a key that does not exist.
    """
    schema = committed_schema() if schema is None else schema
    setting = _setting(config, as_key(key), schema)
    return "\n".join(
        [*_value(setting, show(setting.key), width), *_meaning(setting, schema, width), *_places(config.root, setting)]
    )


def explain_all(config: Config, key: str = "", schema: Schema | None = None, width: int = 100) -> str:
    """All keys at and below a key, including those that are not set: plain values first, then table by table.

    If only one place set a value, it stands at the right, space permitting.
    """
    schema = committed_schema() if schema is None else schema
    lines = list(_below(config.root, _setting(config, as_key(key), schema), schema, width))
    if not key:
        files = [f"#   {layer.source}" for layer in sorted({origin.layer for origin in config.root.origins})]
        lines = [f"# {config.name}, set by (later over earlier)", *files, "", *lines]
    return "\n".join(lines).strip("\n")


def _setting(config: Config, key: Key, schema: Schema) -> Setting:
    setting = at(schema, config.root, key)
    if setting.node is None and not setting.schema:
        raise UsageError(f"{show(key)}: there is no such key{_hint(config.root, schema, key)}")
    return setting


def _below(root: Node, setting: Setting, schema: Schema, width: int) -> Iterator[str]:
    """The lines of one key and of everything in it."""
    table = _table_of(setting)
    if table is None:
        yield from _leaf(root, setting, schema, width)
        return
    here = named(schema.get("$defs", {}), setting.schema, table)
    if setting.key:
        is_described_at_type = "x-module" in here and "description" not in setting.schema
        yield from ("", f"[{show(setting.key)}]")
        yield from () if is_described_at_type else _meaning(setting, schema, width)
        yield from _places(root, setting) if isinstance(table.value, list) else ()
    inner = parts(schema.get("$defs", {}), setting._replace(node=table)).values()
    for part in sorted(inner, key=lambda part: _table_of(part) is not None):
        yield from _below(root, part, schema, width)


def _table_of(setting: Setting) -> Node | None:
    """The table or list of tables at a key, an empty one if that is the code's default; None for other values."""
    if setting.node is not None:
        return setting.node if is_section(plain(setting.node)) else None
    return Node({}, ()) if setting.schema.get("default") == {} and "$ref" in setting.schema else None


def _leaf(root: Node, setting: Setting, schema: Schema, width: int) -> Iterator[str]:
    first, *rest = _value(setting, show(setting.key[-1:]), width)
    places = _places(root, setting)
    if len(places) == 1 and not rest and len(first) + len(places[0]) <= width:
        first, places = first + places[0].strip().rjust(width - len(first)), []
    yield from (first, *rest, *_meaning(setting, schema, width), *places)


def _value(setting: Setting, name: str, width: int) -> list[str]:
    if setting.node is None:
        return [f"{name} = {inline(setting.schema['default'])}" if "default" in setting.schema else name]
    return laid_out(plain(setting.node), width, f"{name} = ")


def _meaning(setting: Setting, schema: Schema, width: int) -> list[str]:
    """The description of a key; for an element of a list, the description of its class."""
    own = named(schema.get("$defs", {}), setting.schema, setting.node or Node(None, ()))
    text = setting.schema.get("description") or own.get("description", "")
    return textwrap.wrap(text, width, initial_indent="  # ", subsequent_indent="  # ", break_on_hyphens=False)


def _places(root: Node, setting: Setting) -> list[str]:
    """The places that set a key, in merge order."""
    if setting.node is None:
        return [f"  {DEFAULT if 'default' in setting.schema else UNSET}"]
    is_plain = len(setting.node.origins) == 1 and setting.node.where.raw == plain(setting.node)
    return [f"  {setting.node.where}"] if is_plain else _chain(root, setting.node, "  ")


def _chain(root: Node, node: Node, indent: str) -> list[str]:
    """The places that set a value, with what each wrote; below, indented, those of the values that it refers to."""
    lines = []
    for origin in node.origins:
        written = "" if isinstance(origin.raw, dict | list) else f"  {inline(origin.raw)}"
        lines.append(f"{indent}{origin}{written if origin.line is not None else ''}")
    raw = node.where.raw
    for target in references(raw) if isinstance(raw, str) else []:
        lines.append(f"{indent}  ${{{target}}}")
        referred = lookup(root, parse_key(target))
        assert referred is not None  # it was resolved
        lines += _chain(root, referred, indent + "    ")
    return lines


def _hint(root: Node, schema: Schema, key: Key) -> str:
    """A hint for the first unknown part of a key: the nearest name, or the length of a list."""
    ways = [at(schema, root, key[:end]) for end in range(len(key) + 1)]
    above, unknown = next((a, b) for a, b in pairwise(ways) if b.node is None and not b.schema)
    if above.node is not None and isinstance(above.node.value, list):
        return f"; {show(above.key)} has {len(above.node.value)} element{'s' * (len(above.node.value) != 1)}"
    return nearest(str(unknown.key[-1]), list(map(str, parts(schema.get("$defs", {}), above))))
