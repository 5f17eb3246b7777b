"""Where values come from: one key, or everything, each key with its meaning and the places that set it."""

import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from sslrun.config.dump import inline, is_section, laid_out
from sslrun.config.interpolate import references
from sslrun.config.load import Config
from sslrun.config.merge import nearest
from sslrun.config.node import Key, Node, as_key, child, lookup, parse_key, plain, show
from sslrun.config.schema_reader import Schema, at, committed_schema, inside, named
from sslrun.errors import UsageError

DEFAULT, UNSET = "default of the code", "not set"


class _Setting(NamedTuple):
    """One key: what stands there (None: nothing sets it), and what its schema asks for."""

    key: Key
    node: Node | None
    asked: Schema


def explain(config: Config, key: str, schema: Schema | None = None, width: int = 100) -> str:
    """The value at a key, what it means, and a line for each place that set it, outermost last.

    Below a place that refers to other keys stand, indented, the places that set those. A key that nothing sets is
    explained by the schema. Raises UsageError for a key that does not exist.
    """
    schema = committed_schema() if schema is None else schema
    setting = _setting(config, as_key(key), schema)
    return "\n".join(
        [*_value(setting, show(setting.key), width), *_meaning(setting, schema, width), *_places(config.root, setting)]
    )


def explain_all(config: Config, key: str = "", schema: Schema | None = None, width: int = 100) -> str:
    """All keys at and below a key, with those that nothing sets: first those with values, then table by table.

    Where one place set a value, it stands at the right if there is room.
    """
    schema = committed_schema() if schema is None else schema
    lines = list(_below(config.root, _setting(config, as_key(key), schema), schema, width))
    if not key:
        files = [f"#   {layer.source}" for layer in sorted({origin.layer for origin in config.root.origins})]
        lines = [f"# {config.name}, set by (later over earlier)", *files, "", *lines]
    return "\n".join(lines).strip("\n")


def _setting(config: Config, key: Key, schema: Schema) -> _Setting:
    setting = _Setting(key, lookup(config.root, key), at(schema, config.root, key))
    if setting.node is None and not setting.asked:
        raise UsageError(f"{show(key)}: there is no such key{_hint(config.root, schema, key)}")
    return setting


def _below(root: Node, setting: _Setting, schema: Schema, width: int) -> Iterator[str]:
    """One key with all that is in it."""
    table = _table_of(setting)
    if table is None:
        yield from _leaf(root, setting, schema, width)
        return
    here = named(schema.get("$defs", {}), setting.asked, table)
    if setting.key:
        is_said_at_its_type = "x-module" in here and "description" not in setting.asked
        yield from ("", f"[{show(setting.key)}]")
        yield from () if is_said_at_its_type else _meaning(setting, schema, width)
        yield from _places(root, setting) if isinstance(table.value, list) else ()
    parts = inside(here, table)
    inner = [_Setting((*setting.key, part), _node(table, part), asked) for part, asked in parts.items()]
    for part in sorted(inner, key=lambda part: _table_of(part) is not None):
        yield from _below(root, part, schema, width)


def _table_of(setting: _Setting) -> Node | None:
    """The table, or list of tables, that stands at a key, or would if the code had its way; None for other values."""
    if setting.node is not None:
        return setting.node if is_section(plain(setting.node)) else None
    return Node({}, ()) if setting.asked.get("default") == {} and "$ref" in setting.asked else None


def _node(table: Node, part: str | int) -> Node | None:
    step = child(table, part)
    return step[1] if step else None


def _leaf(root: Node, setting: _Setting, schema: Schema, width: int) -> Iterator[str]:
    first, *rest = _value(setting, show(setting.key[-1:]), width)
    places = _places(root, setting)
    if len(places) == 1 and not rest and len(first) + len(places[0]) <= width:
        first, places = first + places[0].strip().rjust(width - len(first)), []
    yield from (first, *rest, *_meaning(setting, schema, width), *places)


def _value(setting: _Setting, name: str, width: int) -> list[str]:
    if setting.node is None:
        return [f"{name} = {inline(setting.asked['default'])}" if "default" in setting.asked else name]
    return laid_out(plain(setting.node), width, f"{name} = ")


def _meaning(setting: _Setting, schema: Schema, width: int) -> list[str]:
    """What the schema says of a key; of an element of a list, what it says of the class."""
    found = named(schema.get("$defs", {}), setting.asked, setting.node or Node(None, ()))
    text = setting.asked.get("description") or found.get("description", "")
    return textwrap.wrap(text, width, initial_indent="  # ", subsequent_indent="  # ", break_on_hyphens=False)


def _places(root: Node, setting: _Setting) -> list[str]:
    """The places that set a key, in merge order."""
    if setting.node is None:
        return [f"  {DEFAULT if 'default' in setting.asked else UNSET}"]
    is_plain = len(setting.node.origins) == 1 and setting.node.where.raw == plain(setting.node)
    return [f"  {setting.node.where}"] if is_plain else _chain(root, setting.node, "  ")


def _chain(root: Node, node: Node, indent: str) -> list[str]:
    """The places that set a value, with what each of them wrote; indented below, those that it refers to."""
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
    """The nearest name to the first part of a key that nothing knows; of a list, its length."""
    for end, part in enumerate(key):
        above = lookup(root, key[:end]) or Node({}, ())
        known = inside(named(schema.get("$defs", {}), at(schema, root, key[:end]), above), above)
        if part not in known and lookup(root, key[: end + 1]) is None:
            if isinstance(above.value, list):
                return f"; {show(key[:end])} has {len(above.value)} element{'s' * (len(above.value) != 1)}"
            return nearest(str(part), list(map(str, known)))
    return ""
