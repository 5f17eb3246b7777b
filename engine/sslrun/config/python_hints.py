"""Hints for values written in Python's syntax, as configs of MMSelfSup have them: the same value in TOML."""

import ast
import warnings
from typing import Any

import tomli

from sslrun.config.dump import inline

NO_NONE = "TOML has no None: leave the key out, or drop an inherited one with `_delete_ = [KEY]` in its table"


def hint(text: str) -> str | None:
    """How a Python literal or a `dict(...)` is written in TOML; None if the text is neither. Nothing is executed."""
    text = text.strip()
    if text == "null":  # YAML's and JSON's
        return NO_NONE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings
            value = _value(ast.parse(text, mode="eval").body)
        return (
            NO_NONE if _holds_none(value) else f"in TOML {text if len(text) < 60 else 'it'} is written {inline(value)}"
        )
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def hint_at(text: str, position: int) -> str | None:
    """The hint for the value at or before a position of a TOML text where its parser stopped."""
    begin = text.rfind("\n", 0, position) + 1
    line = text[begin:].partition("\n")[0].rstrip("\r")
    after = line[position - begin :]
    word = after.replace("]", ",").replace("}", ",").partition(",")[0]
    for written in (line.partition("=")[2], after, word):
        written = written.strip().removesuffix(",")
        found = None if _is_toml(written) else hint(written)
        if found:
            return found
    beginning = line.partition("=")[2].strip()
    if beginning.startswith("("):
        return "a list is written [1, 2]"
    return "a table is written { key = 1 }" if beginning.startswith("dict(") else None


def _is_toml(text: str) -> bool:
    try:
        return bool(tomli.loads(f"key = {text}"))
    except (ValueError, RecursionError):
        return False


def _value(node: ast.expr) -> Any:
    """The value of a literal. Raises ValueError for anything else."""
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _value(key) for key in node.keys]  # None for **
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_value, node.values), strict=True))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        if not node.args and None not in named:  # None is **'s name
            return {key: _value(value) for key, value in named.items()}
    if isinstance(node, ast.UnaryOp | ast.Constant):
        value = ast.literal_eval(node)
        if value is None or isinstance(value, bool | int | float | str):
            return value
    raise ValueError("not a literal")


def _holds_none(value: Any) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(map(_holds_none, inside))
