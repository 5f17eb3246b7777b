"""Parses `--set KEY=VALUE`: a one-line TOML file, except that strings need no quotes."""

import re
import shlex
from typing import Any

import tomli

from sslrun.config.dump import inline
from sslrun.config.merge import DELETE
from sslrun.config.node import BARE, QUOTED, Layer, Node, parse_key, show, wrap
from sslrun.config.python_hints import hint
from sslrun.errors import UsageError

_ASSIGNMENT = re.compile(rf"\s*((?:{BARE}|{QUOTED})(?:\s*\.\s*(?:{BARE}|{QUOTED}))*)\s*=(.*)")
_IN_QUOTES = """; put a string in quotes: '"{}"'"""
_LOOKS_LIKE_TOML = re.compile(r"""[\[{"'0-9+-]|(?:true|false)\b""")


def parse_override(text: str, order: int, started: Layer) -> Node:
    """The layer of one `--set`. `${config.dir}` in it is the folder of the started file."""
    shown = text.replace("\n", "\\n")
    layer = Layer(order, f"--set {shown}", started.folder, started.chain)
    match = _ASSIGNMENT.fullmatch(text)
    if match is None:
        raise UsageError(f"{layer.source}: expected KEY=VALUE on one line, such as --set data.views.0.num_views=2")
    key, value = match.groups()
    if value.strip() in ("None", "null"):
        *above, last = parse_key(key)
        deletion = shlex.quote(f"{show((*above, DELETE))}={inline([last])}")
        raise UsageError(
            f"{layer.source}: TOML has no None: leave the key out, or drop an inherited one with --set {deletion}"
        )
    try:
        document = typed(value)
        for part in reversed(parse_key(key)):
            document = {part: document}
    except ValueError as error:
        raise UsageError(f"{layer.source}: {error}") from None
    if "extends" in document:
        raise UsageError(f"{layer.source}: extends is read from files only")
    return wrap(document, layer)


def typed(text: str) -> Any:
    """The value of a text: parsed if it is TOML, otherwise the text itself. Raises ValueError.

    A text that begins like TOML (bracket, brace, quote, digit, sign, true, false) must be TOML, so that a typo in a
    list or a number is not taken for a string. A literal in Python's syntax is answered with its TOML form.
    """
    text = text.strip()
    try:
        document = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError) as error:
        if python := hint(text):
            is_bare = not {"'", '"'} & set(text)
            raise ValueError(f"{python}{_IN_QUOTES.format(text) if is_bare else ''}") from None
        if not _LOOKS_LIKE_TOML.match(text):
            return text
        reason = str(error).partition(" (at ")[0]
        raise ValueError(f"{text!r} is not a TOML value ({reason}){_IN_QUOTES.format(text)}") from None
    if list(document) != ["value"]:
        raise ValueError(f"{text!r} is more than one value")
    return document["value"]
