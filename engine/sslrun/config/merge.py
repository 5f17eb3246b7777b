"""Merges a later layer over an earlier one.

Tables merge deeply; all other values, lists included, are replaced. A table whose keys are all digits, set over a list,
edits its elements. `_delete_ = true` in a table drops everything inherited for it, `_delete_ = ["key", ...]` drops
those keys (for a list: those elements, numbered as inherited); `_delete_` never appears in the result.

A table cannot replace a scalar, nor the reverse, with one exception: a number and a table with the key `schedule`,
which says how a number changes over a run.
"""

from typing import Any, NoReturn

from sslrun.config.node import Key, Node, is_index, names, show
from sslrun.errors import UsageError

DELETE = "_delete_"
SCHEDULE = "schedule"


def merge(old: Node | None, new: Node, key: Key = ()) -> Node:
    """Merges `new` over `old` (None: nothing is inherited), both at `key`."""
    if old is None:
        return _clean(new, key)
    if (_is_number(old) and _is_schedule(new)) or (_is_schedule(old) and _is_number(new)):
        return _clean(new, key)._replace(origins=old.origins + new.origins)
    if not isinstance(new.value, dict):
        if isinstance(old.value, dict):
            refused = f"{kind(new.value)} cannot replace the table set at {old.where}"
            fail(old, new, key, f"{refused}{_how_to_drop(new, key)}")
        return _clean(new, key)._replace(origins=old.origins + new.origins)
    return _merge_table(old, new, key)


def _merge_table(old: Node, new: Node, key: Key) -> Node:
    dropped = _deletions(new, key)
    if dropped is None:
        return _clean(new, key)._replace(origins=old.origins + new.origins)
    for name in dropped:
        if name not in names(old):
            fail(old, new, key, f"{DELETE} names {name!r}, which is not inherited{nearest(name, names(old))}")
    edits = {part: value for part, value in new.value.items() if part != DELETE}
    if isinstance(old.value, dict):
        merged: Any = {part: value for part, value in old.value.items() if part not in dropped}
        for part, value in edits.items():
            merged[part] = merge(merged.get(part), value, (*key, part))
    elif isinstance(old.value, list) and (edits or dropped) and all(map(is_index, edits)):
        merged = _edited(old, edits, key)
        merged = [element for index, element in enumerate(merged) if str(index) not in dropped]
    else:
        is_list = isinstance(old.value, list)
        hint = (
            "; a table over a list names its elements: 0, 1, ..."
            if is_list
            else f"; drop the value first: `{DELETE} = true` in this table"
        )
        fail(old, new, key, f"a table cannot replace {kind(old.value)} set at {old.where}{hint}")
    return Node(merged, old.origins + new.origins)


def _is_number(node: Node) -> bool:
    return isinstance(node.value, int | float) and not isinstance(node.value, bool)


def _is_schedule(node: Node) -> bool:
    return isinstance(node.value, dict) and SCHEDULE in node.value


def _edited(old: Node, edits: dict[str, Node], key: Key) -> list[Node]:
    """The elements of an inherited list, with a table of index -> value merged over them."""
    elements = list(old.value)
    for part, value in edits.items():
        index = int(part)
        if index >= len(elements):
            length = "1 element" if len(elements) == 1 else f"{len(elements)} elements"
            fail(old, value, (*key, part), f"index {part} does not exist, the list set at {old.where} has {length}")
        elements[index] = merge(elements[index], value, (*key, part))
    return elements


def _clean(node: Node, key: Key) -> Node:
    """A value that inherits nothing, without its `_delete_` keys, which have nothing to drop."""
    if isinstance(node.value, list):
        return node._replace(value=[_clean(value, (*key, index)) for index, value in enumerate(node.value)])
    if isinstance(node.value, dict):
        _deletions(node, key)
        kept = {part: value for part, value in node.value.items() if part != DELETE}
        return node._replace(value={part: _clean(value, (*key, part)) for part, value in kept.items()})
    return node


def _deletions(node: Node, key: Key) -> list[str] | None:
    """The inherited keys that `_delete_` of a table drops; None for all of them."""
    marker = node.value.get(DELETE)
    if marker is None or marker.value is False:
        return []
    if marker.value is True:
        return None
    if isinstance(marker.value, list) and all(isinstance(part.value, str) for part in marker.value):
        return [part.value for part in marker.value]
    fail(None, marker, (*key, DELETE), f"expected true or a list of keys, got {kind(marker.value)}")


def fail(old: Node | None, new: Node, key: Key, message: str) -> NoReturn:
    """Raises UsageError about `new` over `old`, with the chains of files that led to each of them."""
    ours, theirs = new.where.layer.chain, old.where.layer.chain if old else ()
    chains = [theirs] if theirs[: len(ours)] == ours else [ours, theirs]
    via = "; ".join(" -> ".join(chain) for chain in chains if len(chain) > 1)
    via = f" (files: {via})" if via else ""
    raise UsageError(f"{new.where}: {show(key)}: {message}{via}")


def _how_to_drop(new: Node, key: Key) -> str:
    """A hint for the end of an error: how to drop the table before setting the value."""
    if is_index(str(key[-1])):
        return ""
    if new.where.line is None:
        return f"""; drop the table first: --set '{show((*key[:-1], DELETE))}=["{key[-1]}"]'"""
    place = f"in [{show(key[:-1])}]" if len(key) > 1 else "at the top level"
    return f"""; drop the table first: `{DELETE} = ["{key[-1]}"]` {place}"""


def kind(value: Any) -> str:
    """A value in words: `a table`, `the string "abc"`."""
    match value:
        case dict():
            return "a table"
        case list():
            return "a list"
        case bool():
            return f"the boolean {str(value).lower()}"
        case str():
            return f'the string "{value}"' if len(value) < 60 and value.isprintable() else "a string"
        case int() | float():
            return f"the number {value}"
    return f"the date or time {value}"


def nearest(word: str, known: list[str]) -> str:
    """A hint for the end of an error: the known names nearest to a word; empty if none is near."""
    from difflib import get_close_matches  # costs a millisecond that only errors should pay

    by_lower = {name.lower(): name for name in known}
    begun = [name for name in by_lower if word and name.startswith(word.lower())]
    close = get_close_matches(word.lower(), by_lower, n=2, cutoff=0.6) or begun[:2]
    return f"; did you mean {' or '.join(by_lower[name] for name in close)}?" if close else ""
