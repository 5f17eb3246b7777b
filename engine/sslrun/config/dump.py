"""Values as TOML: a whole configuration that loads again, one value on a line, or one laid out for reading."""

from collections.abc import Iterator
from typing import Any

from sslrun.config.node import Key, show


def dump(values: dict[str, Any]) -> str:
    """Values as TOML that `load` reads back as the same values: a literal `${` is written `$${`."""
    return "\n".join(_table(escape(values), ())).lstrip("\n") + "\n"


def escape(value: Any) -> Any:
    """A resolved value as it must be written so that resolving gives it back."""
    if isinstance(value, dict):
        return {key: escape(below) for key, below in value.items()}
    if isinstance(value, list):
        return [escape(below) for below in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


def _table(table: dict[str, Any], key: Key) -> Iterator[str]:
    """The lines of one table: what fits on a line first, then its own tables and lists of tables."""
    below = {part: value for part, value in table.items() if is_section(value)}
    for part, value in table.items():
        if part not in below:
            yield f"{show((part,))} = {inline(value)}"
    for part, value in below.items():
        header = show((*key, part))
        for section in value if isinstance(value, list) else [value]:
            yield from ("", f"[[{header}]]" if isinstance(value, list) else f"[{header}]")
            yield from _table(section, (*key, part))


def is_section(value: Any) -> bool:
    """Whether a value is written with headers of its own: a table, or a list of nothing but tables."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(element, dict) for element in value)
    return isinstance(value, dict)


def inline(value: Any) -> str:
    """Any value on one line of TOML."""
    import tomli_w

    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inline, value))}]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{show((key,))} = {inline(below)}" for key, below in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


def laid_out(value: Any, width: int, name: str = "") -> list[str]:
    """A name and a value on one line where that is not longer than `width`, else a line for each part, and so on down.

    For people: TOML 1.0 has no inline tables of several lines.
    """
    line = name + inline(value)
    if len(line) <= width or not isinstance(value, dict | list):
        return [line]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    named = [(f"{show((key,))} = ", below) for key, below in value.items()] if isinstance(value, dict) else []
    lines = [name + opening]
    for part, below in named or [("", below) for below in value]:
        lines += [f"  {line}" for line in laid_out(below, width - 3, part)]
        lines[-1] += ","
    return [*lines, closing]
