"""Finds the line of each key of a TOML text.

tomli gives values without their places. This scanner walks a text that tomli has accepted, so it only follows the
structure (headers, keys, brackets, strings, comments) and rejects nothing. For every table, key and list element of
tomli's result it gives the line on which that key path is first written.
"""

import re
from bisect import bisect_right
from functools import lru_cache

from sslrun.config.node import Key, dotted

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SCALAR = re.compile(
    r'''
      """(?:[^\\]|\\.)*?"""(?:"{0,2})         # the closing quotes may follow up to two of the text's own
    | \'\'\'.*?\'\'\'(?:'{0,2})
    | "(?:[^"\\\n]|\\.)*"
    | '[^'\n]*'
    | [^,\]}\#\n]+                            # numbers, booleans, dates
    ''',
    re.VERBOSE | re.DOTALL,
)


_TOKEN = re.compile(
    r"""\"{3}(?:[^\\]|\\.)*?\"{3}|'{3}.*?'{3}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|\#[^\n]*|[\[{\]}]""", re.DOTALL
)


def nesting_line(text: str, depth: int) -> int | None:
    """The line on which brackets and braces are first nested deeper than `depth`; None if they never are.

    Also for texts that are nested too deep to be parsed.
    """
    level = 0
    for token in _TOKEN.finditer(text):
        level += (token[0] in "[{") - (token[0] in "]}")
        if level > depth:
            return text.count("\n", 0, token.start()) + 1
    return None


class _Scan:
    """The text, and the lines found so far."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.starts = [0, *(m.end() for m in re.finditer("\n", text))]
        self.lines: dict[Key, int] = {}
        self.elements: dict[Key, int] = {}  # arrays of tables: path -> index of the newest element

    def record(self, key: Key, position: int) -> None:
        self.lines.setdefault(key, bisect_right(self.starts, position))

    def skip(self, position: int) -> int:
        match = _BLANK.match(self.text, position)
        assert match is not None  # it matches the empty text
        return match.end()


@lru_cache(maxsize=64)
def key_lines(text: str) -> dict[Key, int]:
    """The line (from 1) of every key path of a valid TOML text; list elements are named by index. Do not modify the
    result: it is cached."""
    scan = _Scan(text)
    table: Key = ()
    position = scan.skip(0)
    while position < len(text):
        if text[position] == "[":
            table, position = _header(scan, position)
        else:
            position = _pair(scan, position, table)
        position = scan.skip(position)
    return scan.lines


def _header(scan: _Scan, position: int) -> tuple[Key, int]:
    """`[a.b]` or `[[a.b]]`: returns the table to which the following keys belong, and the position behind it."""
    start = position
    is_array = scan.text.startswith("[[", position)
    parts, position = dotted(scan.text, position + 1 + is_array)
    key: Key = ()
    for place, part in enumerate(parts):
        key = (*key, part)
        scan.record(key, start)
        is_new_element = is_array and place == len(parts) - 1
        if is_new_element:
            scan.elements[key] = scan.elements.get(key, -1) + 1
        if key in scan.elements:
            key = (*key, scan.elements[key])
            scan.record(key, start)
    return key, position + 1 + is_array


def _pair(scan: _Scan, position: int, table: Key) -> int:
    """`a.b = value` in a table or an inline table; returns the position behind it."""
    parts, after = dotted(scan.text, position)
    for count in range(1, len(parts) + 1):
        scan.record((*table, *parts[:count]), position)
    return _value(scan, scan.skip(after + 1), (*table, *parts))


def _value(scan: _Scan, position: int, key: Key) -> int:
    """One value, whose parts are recorded below `key`; returns the position behind it."""
    opening = scan.text[position]
    if opening not in "[{":
        match = _SCALAR.match(scan.text, position)
        assert match is not None, f"no value at {position}"
        return match.end()
    position, index = scan.skip(position + 1), 0
    while scan.text[position] not in "]}":
        if opening == "{":
            position = _pair(scan, position, key)
        else:
            scan.record((*key, index), position)
            position = _value(scan, position, (*key, index))
        position, index = scan.skip(position), index + 1
        if scan.text[position] == ",":
            position = scan.skip(position + 1)
    return position + 1
