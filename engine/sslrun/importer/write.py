"""Writes a recipe as TOML, in the order and the form of the recipes that ship."""

from collections.abc import Iterator
from typing import Any

from sslrun.config.dump import inline, is_section
from sslrun.config.node import Node, plain, show
from sslrun.importer.old import Effect, Report, one_line

_ORDER = (
    "epochs", "max_iters", "global_batch", "seed", "work_dir", "load_from", "load_strict", "resume_from", "vars",
    "model", "data", "optimizer", "lr", "engine", "checkpoint", "log",
)  # fmt: skip
_SECTIONS = ("backbone", "neck", "head", "source")  # tables that have a header however short they are
_WIDTH = 120
_HEADINGS = {
    Effect.LOST: "Not converted",
    Effect.CHANGED: "Converted, but not to the same",
    Effect.LEFT: "Left out, since nothing depends on it here",
}


def text(recipe: dict[str, Node], report: Report, made_of: str) -> str:
    """The text of the whole file.

    Args:
        recipe: by top-level keys.
        report: what the head of the file says of the conversion.
        made_of: the old file, as shown to people.
    """
    values = {key: plain(value) for key, value in recipe.items()}
    ordered = {key: values[key] for key in (*_ORDER, *values) if key in values}
    return "\n".join([*_head(report, made_of), "", *_table(ordered, "")]).rstrip("\n") + "\n"


def _head(report: Report, made_of: str) -> Iterator[str]:
    yield one_line(f"# Made by `sslrun config import` from {made_of}.")
    for effect, heading in _HEADINGS.items():
        findings = report.findings(effect)
        if findings:
            yield "#"
            yield f"# {heading}:"
            yield from (f"#   {finding.line()}" for finding in findings)


def _table(table: dict[str, Any], header: str) -> Iterator[str]:
    """One table: what stands on a line first, then what has a header of its own."""
    sections = {key: value for key, value in table.items() if _is_section(key, value, header)}
    for key, value in table.items():
        if key not in sections:
            yield f"{show((key,))} = {_value(value, len(show((key,))) + 3)}"
    for key, value in sections.items():
        name = f"{header}{show((key,))}"
        for below in value if isinstance(value, list) else [value]:
            yield from ("", f"[[{name}]]" if isinstance(value, list) else f"[{name}]")
            yield from _table(below, f"{name}.")


def _is_section(key: str, value: Any, header: str) -> bool:
    """Whether a value gets a header: tables of the first two levels, and lists of tables but for transforms."""
    if not isinstance(value, dict):
        return key != "transforms" and is_section(value)
    has_tables = any(isinstance(below, dict) for below in value.values())
    return not header or key in _SECTIONS or len(inline(value)) + len(key) > 60 or has_tables


def _value(value: Any, indent: int) -> str:
    """A value; a list of tables, or one that is too long for its line, with a line for each element."""
    if isinstance(value, str) and "\\" in value and "'" not in value and value.isprintable():
        return f"'{value}'"
    line = inline(value)
    if isinstance(value, list) and (len(line) + indent > _WIDTH or is_section(value)):
        return "\n".join(["[", *(f"  {inline(element)}," for element in value), "]"])
    return line
