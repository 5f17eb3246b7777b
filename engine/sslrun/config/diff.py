"""In what two resolved configurations differ, value by value, and where each value was set.

What a run would do is compared, not what the files say: a key that only one side sets is compared with the default that
the code has on the other, 1 is 1.0, and `vars` count only through what refers to them. Lists of tables (views,
transforms, rules) are lined up first, so that an element that was put in does not make all that follow it look changed.
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
    """One of the two: a key, what stands there (None: nothing), and what its schema asks for."""

    key: Key
    node: Node | None
    asked: Schema


class Difference(NamedTuple):
    """A value that one side has not, or that is another on the other side; or an element that stands elsewhere.

    The keys of the sides differ in the indices of elements that have come to stand in other places.
    """

    old: Side
    new: Side
    is_moved: bool = False


def differences(old: Config, new: Config, schema: Schema | None = None) -> list[Difference]:
    """What differs, in the order of the old configuration."""
    schema = committed_schema() if schema is None else schema
    found = _compare(schema.get("$defs", {}), Side((), old.root, schema), Side((), new.root, schema))
    return [difference for difference in found if difference.old.key[0] != "vars"]


def render(found: list[Difference], names: tuple[str, str], width: int = 100, is_colored: bool = False) -> str:
    """What the two are called, then each difference: the key, and the old and the new value with their places."""

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
    """A value, and the place that set it, at the right where there is room; of what has moved only the place."""
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
    """A part of a table or list; where nothing sets it, the default of the code."""
    assert side.node is not None
    asked = inside(named(definitions, side.asked, side.node), side.node).get(part, {})
    step = child(side.node, part)
    node = step[1] if step else _of_code(asked["default"]) if "default" in asked else None
    return Side((*side.key, part), node, asked)


def _compare_elements(definitions: Schema, old: list[Side], new: list[Side]) -> Iterator[Difference]:
    """Equal elements are lined up and, between them, those of one class. Of the rest, those of one class have moved."""
    pairs: list[tuple[Side, Side]] = []
    gone: list[Side] = []
    come: list[Side] = []
    for olds, news, _ in _runs(old, new, _value):
        for left, right, are_of_one_class in _runs(olds, news, _class):
            if are_of_one_class:
                pairs += zip(left, right, strict=True)
            else:
                gone, come = gone + left, come + right
    found = [list(_compare(definitions, *pair)) for pair in pairs]
    for side in gone:
        twins = sorted((twin for twin in come if _class(twin) == _class(side)), key=lambda t: _value(t) != _value(side))
        if twins:
            come.remove(twins[0])
            found.append([Difference(side, twins[0], is_moved=True), *_compare(definitions, side, twins[0])])
        else:
            found.append([Difference(side, Side(side.key, None, {}))])
    found += [[Difference(Side(side.key, None, {}), side)] for side in come]
    for element in sorted(filter(None, found), key=lambda element: element[0].new.key):
        yield from element


def _runs(old: list[Side], new: list[Side], mark: Callable[[Side], str]) -> list[tuple[list[Side], list[Side], bool]]:
    """Two lists cut into runs, in order: what stands on each side, and whether the marks of these are equal."""
    codes = SequenceMatcher(None, [*map(mark, old)], [*map(mark, new)], autojunk=False).get_opcodes()
    return [(old[a:b], new[c:d], code == "equal") for code, a, b, c, d in codes]


def _value(side: Side) -> str:
    return repr(side.node and plain(side.node))


def _class(side: Side) -> str:
    """The class that a table names; nothing for a table that names none."""
    table = side.node.value if side.node else {}
    return next((str(table[tag].value) for tag in TAGS if tag in table), "")


def _is_list_of_tables(node: Node) -> bool:
    return isinstance(node.value, list) and all(isinstance(element.value, dict) for element in node.value)


def _of_code(value: Any) -> Node:
    """A default as nodes that no place set."""
    if isinstance(value, dict):
        return Node({key: _of_code(below) for key, below in value.items()}, ())
    if isinstance(value, list):
        return Node([_of_code(below) for below in value], ())
    return Node(value, ())
