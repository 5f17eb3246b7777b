"""The tree of a config: plain values, each with the places that set it."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sslrun.errors import UsageError

Key = tuple[str | int, ...]

BARE = r"[A-Za-z0-9_-]+"
QUOTED = r""""(?:[^"\\\n]|\\.)*"|'[^'\n]*'"""
_PART = re.compile(rf"[ \t]*({BARE}|{QUOTED})[ \t]*")
_INDEX = re.compile(r"0|[1-9][0-9]*")


class Layer(NamedTuple):
    """One file, or one `--set`, in the order in which they are merged.

    Attributes:
        order: place in that order; a higher one was merged later.
        source: the path of the file as shown in messages, or the text of the `--set`.
        folder: the value of `${config.dir}` in this layer.
        chain: the files that led here by `extends`, the started one first, this one last.
        lines: gives the line of each key path; called only for messages, since most configs have no errors.
    """

    order: int
    source: str
    folder: str
    chain: tuple[str, ...]
    lines: Callable[[], dict[Key, int]] = dict


class Origin(NamedTuple):
    """One place that set a value: `str()` gives file:line, or the `--set`.

    Attributes:
        layer: the file or `--set`.
        key: key path of the value in the file; None for a value without a line (a `--set`, the environment).
        raw: the value as written there.
    """

    layer: Layer
    key: Key | None
    raw: Any

    @property
    def line(self) -> int | None:
        return None if self.key is None else self.layer.lines().get(self.key, 1)

    def __str__(self) -> str:
        return self.layer.source if self.line is None else f"{self.layer.source}:{self.line}"


class Node(NamedTuple):
    """A value and the places that set it, in merge order: the last one wins.

    `value` is a dict of nodes, a list of nodes, or a scalar. Nodes are never modified, so they may be shared.
    """

    value: Any
    origins: tuple[Origin, ...]

    @property
    def where(self) -> Origin:
        return self.origins[-1]


def wrap(value: Any, layer: Layer, key: Key | None = None) -> Node:
    """The nodes of a parsed value at a key of a layer."""
    inner: Any = value
    if isinstance(value, dict):
        inner = {k: wrap(v, layer, None if key is None else (*key, k)) for k, v in value.items()}
    elif isinstance(value, list):
        inner = [wrap(v, layer, None if key is None else (*key, i)) for i, v in enumerate(value)]
    return Node(inner, (Origin(layer, key, value),))


def plain(node: Node) -> Any:
    """The value without origins, as new dicts and lists."""
    if isinstance(node.value, dict):
        return {k: plain(v) for k, v in node.value.items()}
    if isinstance(node.value, list):
        return [plain(v) for v in node.value]
    return node.value


def same(a: Any, b: Any) -> bool:
    """Whether two plain values are equal; true is not 1, and NaN is NaN."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b or (a != a and b != b))


def child(node: Node, part: str | int) -> tuple[str | int, Node] | None:
    """The part of a table or list: its key (an int for a list) and its node; None if there is no such part."""
    if isinstance(node.value, dict):
        inner = node.value.get(str(part))
        return None if inner is None else (str(part), inner)
    if isinstance(node.value, list) and _INDEX.fullmatch(str(part)) and int(part) < len(node.value):
        return int(part), node.value[int(part)]
    return None


def lookup(root: Node, key: Key) -> Node | None:
    """The node at a key; None if the key is not set."""
    here = root
    for part in key:
        step = child(here, part)
        if step is None:
            return None
        here = step[1]
    return here


def as_key(key: str | Key) -> Key:
    """A key as parts; the empty text is the whole config. Raises UsageError."""
    if not isinstance(key, str):
        return key
    try:
        return parse_key(key) if key else ()
    except ValueError as error:
        raise UsageError(str(error)) from None


def find(root: Node, key: Key) -> Node:
    """The node at a key. Raises UsageError if the key is not set."""
    node = lookup(root, key)
    if node is None:
        raise UsageError(f"{show(key)} is not set")
    return node


def names(node: Node) -> list[str]:
    """The keys of a table, or the indices of a list, as text."""
    if isinstance(node.value, dict):
        return list(node.value)
    return [str(i) for i in range(len(node.value))] if isinstance(node.value, list) else []


def is_index(part: str) -> bool:
    """Whether a key is a valid index of a list."""
    return _INDEX.fullmatch(part) is not None


def walk(node: Node, key: Key = ()) -> Iterator[tuple[Key, Node]]:
    """This node and every node below it, parents first, in the order of the text."""
    yield key, node
    if isinstance(node.value, dict):
        for part, below in node.value.items():
            yield from walk(below, (*key, part))
    elif isinstance(node.value, list):
        for index, below in enumerate(node.value):
            yield from walk(below, (*key, index))


def parse_key(text: str) -> tuple[str, ...]:
    """`data.views.0."odd name"` -> its parts, quoted as in TOML. Raises ValueError."""
    parts, end = dotted(text, 0)
    if end == len(text) and not text.endswith("."):
        return tuple(parts)
    raise ValueError(f"{text!r} is not a key; a key is names joined by dots, such as data.views.0.num_views")


def dotted(text: str, position: int) -> tuple[list[str], int]:
    """The parts of the key that begins at a position of a text, and the position behind it."""
    parts = []
    while match := _PART.match(text, position):
        parts.append(unquote(match[1]))
        position = match.end()
        if text[position : position + 1] != ".":
            break
        position += 1
    return parts, position


def unquote(part: str) -> str:
    """One part of a TOML key without quotes and escapes."""
    if part[0] == "'":
        return part[1:-1]
    if part[0] != '"':
        return part
    import tomli

    return tomli.loads(f"k = {part}")["k"]


def show(key: Key) -> str:
    """A key as it is written in TOML."""
    return ".".join(str(part) if re.fullmatch(BARE, str(part)) else _quoted(str(part)) for part in key)


def _quoted(part: str) -> str:
    return json.dumps(part, ensure_ascii=False).replace("\x7f", "\\u007f")  # valid in JSON, not in TOML
