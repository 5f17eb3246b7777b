"""Compares two resolved configs value by value, with the place that set each value.

The comparison is of what a run would do, not of the files: a key that is not set counts with the code's default, on
either side and at any depth, 1 equals 1.0, a path equals the same path from another folder, and `vars` count only
through the values that refer to them. Between two classes, a key that only one of them has counts if its value is not
the default. (Not known here are defaults of a user's own classes that are not imported, and those that take a whole
component from elsewhere in the recipe, such as `monitor.transforms`: such a key counts as not set.) Lists of tables
(views, transforms, rules) are aligned first, so that an inserted element does not make all elements after it look
changed.
"""

import json
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from sslrun.config.check import TAGS
from sslrun.config.dump import laid_out
from sslrun.config.explain import DEFAULT
from sslrun.config.load import Config
from sslrun.config.node import Layer, Node, plain, same, show, wrap
from sslrun.config.own_classes import with_own_classes
from sslrun.config.paths import absolute, is_path
from sslrun.config.schema_reader import DEFAULT_OF, Schema, Setting, committed_schema, parts

_CODE = Layer(0, DEFAULT, "", ())
_RED, _GREEN, _BOLD, _END = "\x1b[31m", "\x1b[32m", "\x1b[1m", "\x1b[0m"


class Difference(NamedTuple):
    """A value that differs or that only one side has, or an element that was moved.

    The keys of the two sides differ in the indices of elements that stand at different places of their lists.
    """

    old: Setting
    new: Setting
    is_moved: bool = False


def differences(old: Config, new: Config, schema: Schema | None = None) -> list[Difference]:
    """The differences, in the order of the old config."""
    schema = with_own_classes(committed_schema()) if schema is None else schema
    compared = _compare(schema.get("$defs", {}), Setting((), old.root, schema), Setting((), new.root, schema))
    return [difference for difference in compared if difference.old.key[0] != "vars"]


def render(found: list[Difference], names: tuple[str, str], width: int = 100, is_colored: bool = False) -> str:
    """The names of both configs, then each difference: the key, and the old and the new value with their places."""

    def painted(text: str, color: str) -> str:
        return f"{color}{text}{_END}" if is_colored and text else text

    lines = [painted(f"--- {names[0]}", _RED), painted(f"+++ {names[1]}", _GREEN), ""]
    for old, new, is_moved in found:
        title = " -> ".join(dict.fromkeys(show(side.key) for side in (old, new) if side.node))
        lines.append(painted(f"{title}: {_class(new)} moved" if is_moved else title, _BOLD))
        for node, sign, color in ((old.node, "  - ", _RED), (new.node, "  + ", _GREEN)):
            shown = _shown(node, sign, width, is_moved) if node else []
            lines += [painted(text, color) + rest for text, rest in shown]
    return "\n".join(lines)


def _shown(node: Node, sign: str, width: int, is_moved: bool) -> list[tuple[str, str]]:
    """A value and the place that set it, at the right if there is room; for a moved element only the place."""
    place = str(node.where)
    if is_moved:
        return [(sign, place)]
    values = [sign + line for line in laid_out(plain(node), width - len(sign))]
    room = width - len(values[0])
    if len(values) == 1 and len(place) + 2 <= room:
        return [(values[0], place.rjust(room))]
    return [*((value, "") for value in values), ("", f"    {place}")]


def _compare(definitions: Schema, old: Setting, new: Setting) -> Iterator[Difference]:
    if old.node is None or new.node is None:
        if old.node or new.node:
            yield Difference(old, new)
    elif isinstance(old.node.value, dict) and isinstance(new.node.value, dict):
        olds, news = _parts(definitions, old), _parts(definitions, new)
        for part in {**old.node.value, **new.node.value, **olds, **news}:
            sides = [(Setting((*side.key, part), None, {})) for side in (old, new)]
            one, other = olds.get(part, sides[0]), news.get(part, sides[1])
            if (part in olds and part in news) or not _is_default(definitions, one if part in olds else other):
                yield from _compare(definitions, one, other)
    elif _is_list_of_tables(old.node) and _is_list_of_tables(new.node):
        yield from _compare_elements(definitions, *([*_parts(definitions, side).values()] for side in (old, new)))
    elif not same(_completed(definitions, old), _completed(definitions, new)):
        yield Difference(old, new)


def _completed(definitions: Schema, side: Setting) -> Any:
    """The value of a setting as what it does: with the defaults of keys that are not set, with absolute paths as the
    recipe of a run has them, and with whole numbers as integers."""
    if side.node is None:
        return None
    value = side.node.value
    if isinstance(value, dict | list):
        below = {part: _completed(definitions, each) for part, each in _parts(definitions, side).items() if each.node}
        return list(below.values()) if isinstance(value, list) else below
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return absolute(value) if isinstance(value, str) and is_path(definitions, side.schema) else value


def _is_default(definitions: Schema, side: Setting) -> bool:
    """Whether a setting has the code's default."""
    if "default" not in side.schema:
        return side.node is None
    default = side._replace(node=wrap(side.schema["default"], _CODE))
    return same(_completed(definitions, side), _completed(definitions, default))


def _parts(definitions: Schema, side: Setting) -> dict[str | int, Setting]:
    """The parts of a table or list; a key that is not set has the code's default."""
    known = parts(definitions, side)
    for part, below in known.items():
        schema = {**below.schema, **_computed_default(below.schema, known)}
        if below.node is None and "default" in schema:
            known[part] = below._replace(node=wrap(schema["default"], _CODE), schema=schema)
        else:
            known[part] = below._replace(schema=schema)
    return known


def _computed_default(schema: Schema, siblings: dict[str | int, Setting]) -> Schema:
    """The default that depends on another key (a transformer's width on its `arch`), as part of a schema."""
    for key, values in schema.get(DEFAULT_OF, {}).items():
        other = siblings[key]
        value = other.schema.get("default") if other.node is None else other.node.value
        if isinstance(value, str) and value in values:
            return {"default": values[value]}
    return {}


def _compare_elements(definitions: Schema, old: list[Setting], new: list[Setting]) -> Iterator[Difference]:
    """Aligns equal elements and, between them, elements of the same class; the remaining ones of a class have moved."""

    def value(side: Setting) -> str:
        return json.dumps(_completed(definitions, side), sort_keys=True, default=str)

    pairs: list[tuple[Setting, Setting]] = []
    removed: list[Setting] = []
    added: list[Setting] = []
    for olds, news, _ in _runs(old, new, value):
        for left, right, are_of_one_class in _runs(olds, news, _class):
            if are_of_one_class:
                pairs += zip(left, right, strict=True)
            else:
                removed, added = removed + left, added + right
    compared = [list(_compare(definitions, *pair)) for pair in pairs]
    for side in removed:
        twins = sorted((twin for twin in added if _class(twin) == _class(side)), key=lambda t: value(t) != value(side))
        if twins:
            added.remove(twins[0])
            compared.append([Difference(side, twins[0], is_moved=True), *_compare(definitions, side, twins[0])])
        else:
            compared.append([Difference(side, Setting(side.key, None, {}))])
    compared += [[Difference(Setting(side.key, None, {}), side)] for side in added]
    for element in sorted(filter(None, compared), key=lambda element: element[0].new.key):
        yield from element


def _runs(
    old: list[Setting], new: list[Setting], mark: Callable[[Setting], str]
) -> list[tuple[list[Setting], list[Setting], bool]]:
    """Two lists cut into runs, in order: the elements of each side, and whether their marks are equal."""
    codes = SequenceMatcher(None, [*map(mark, old)], [*map(mark, new)], autojunk=False).get_opcodes()
    return [(old[a:b], new[c:d], code == "equal") for code, a, b, c, d in codes]


def _class(side: Setting) -> str:
    """The class that a table names; empty for a table that names none."""
    table = side.node.value if side.node else {}
    return next((str(table[tag].value) for tag in TAGS if tag in table), "")


def _is_list_of_tables(node: Node) -> bool:
    return isinstance(node.value, list) and all(isinstance(element.value, dict) for element in node.value)
