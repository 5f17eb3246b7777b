"""Compares two resolved configs value by value, with the place that set each value.

The comparison is of what a run would do, not of the files: a key that only one side sets is compared with the code's
default, 1 equals 1.0, and `vars` count only through the values that refer to them. Lists of tables (views, transforms,
rules) are aligned first, so that an inserted element does not make all elements after it look changed.
"""

from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from sslrun.config.check import TAGS
from sslrun.config.dump import laid_out
from sslrun.config.explain import DEFAULT
from sslrun.config.load import Config
from sslrun.config.node import Key, Node, child, plain, same, show
from sslrun.config.schema_reader import Schema, committed_schema, inside, named

_RED, _GREEN, _BOLD, _END = "\x1b[31m", "\x1b[32m", "\x1b[1m", "\x1b[0m"


class Side(NamedTuple):
    """A key of one config, its value (None: not set) and the schema of the key."""

    key: Key
    node: Node | None
    schema: Schema


class Difference(NamedTuple):
    """A value that differs or that only one side has, or an element that was moved.

    The keys of the two sides differ in the indices of elements that stand at different places of their lists.
    """

    old: Side
    new: Side
    is_moved: bool = False


def differences(old: Config, new: Config, schema: Schema | None = None) -> list[Difference]:
    """The differences, in the order of the old config."""
    schema = committed_schema() if schema is None else schema
    compared = _compare(schema.get("$defs", {}), Side((), old.root, schema), Side((), new.root, schema))
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
    place = str(node.where) if node.origins else DEFAULT
    if is_moved:
        return [(sign, place)]
    values = [sign + line for line in laid_out(plain(node), width - len(sign))]
    room = width - len(values[0])
    if len(values) == 1 and len(place) + 2 <= room:
        return [(values[0], place.rjust(room))]
    return [*((value, "") for value in values), ("", f"    {place}")]


def _compare(definitions: Schema, old: Side, new: Side) -> Iterator[Difference]:
    if old.node is None or new.node is None:
        if old.node or new.node:
            yield Difference(old, new)
    elif isinstance(old.node.value, dict) and isinstance(new.node.value, dict):
        for part in {**old.node.value, **new.node.value}:
            yield from _compare(definitions, _below(definitions, old, part), _below(definitions, new, part))
    elif _is_list_of_tables(old.node) and _is_list_of_tables(new.node):
        sides = [[_below(definitions, old, i) for i in range(len(old.node.value))]]
        sides += [[_below(definitions, new, i) for i in range(len(new.node.value))]]
        yield from _compare_elements(definitions, *sides)
    elif not same(plain(old.node), plain(new.node)):
        yield Difference(old, new)


def _below(definitions: Schema, side: Side, part: str | int) -> Side:
    """A part of a table or list; a key that is not set has the code's default."""
    assert side.node is not None
    schema = inside(named(definitions, side.schema, side.node), side.node).get(part, {})
    step = child(side.node, part)
    node = step[1] if step else _of_code(schema["default"]) if "default" in schema else None
    return Side((*side.key, part), node, schema)


def _compare_elements(definitions: Schema, old: list[Side], new: list[Side]) -> Iterator[Difference]:
    """Aligns equal elements and, between them, elements of the same class; the remaining ones of a class have moved."""
    pairs: list[tuple[Side, Side]] = []
    removed: list[Side] = []
    added: list[Side] = []
    for olds, news, _ in _runs(old, new, _value):
        for left, right, are_of_one_class in _runs(olds, news, _class):
            if are_of_one_class:
                pairs += zip(left, right, strict=True)
            else:
                removed, added = removed + left, added + right
    compared = [list(_compare(definitions, *pair)) for pair in pairs]
    for side in removed:
        twins = sorted(
            (twin for twin in added if _class(twin) == _class(side)), key=lambda t: _value(t) != _value(side)
        )
        if twins:
            added.remove(twins[0])
            compared.append([Difference(side, twins[0], is_moved=True), *_compare(definitions, side, twins[0])])
        else:
            compared.append([Difference(side, Side(side.key, None, {}))])
    compared += [[Difference(Side(side.key, None, {}), side)] for side in added]
    for element in sorted(filter(None, compared), key=lambda element: element[0].new.key):
        yield from element


def _runs(old: list[Side], new: list[Side], mark: Callable[[Side], str]) -> list[tuple[list[Side], list[Side], bool]]:
    """Two lists cut into runs, in order: the elements of each side, and whether their marks are equal."""
    codes = SequenceMatcher(None, [*map(mark, old)], [*map(mark, new)], autojunk=False).get_opcodes()
    return [(old[a:b], new[c:d], code == "equal") for code, a, b, c, d in codes]


def _value(side: Side) -> str:
    return repr(side.node and plain(side.node))


def _class(side: Side) -> str:
    """The class that a table names; empty for a table that names none."""
    table = side.node.value if side.node else {}
    return next((str(table[tag].value) for tag in TAGS if tag in table), "")


def _is_list_of_tables(node: Node) -> bool:
    return isinstance(node.value, list) and all(isinstance(element.value, dict) for element in node.value)


def _of_code(value: Any) -> Node:
    """A default as nodes without origins."""
    if isinstance(value, dict):
        return Node({key: _of_code(below) for key, below in value.items()}, ())
    if isinstance(value, list):
        return Node([_of_code(below) for below in value], ())
    return Node(value, ())
