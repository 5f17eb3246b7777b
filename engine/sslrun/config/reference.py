"""docs/reference.md: every table and every component that a recipe can have, as Markdown."""

import re
import textwrap
from collections.abc import Iterator

from sslrun.config.dump import inline
from sslrun.config.node import Key, show
from sslrun.config.schema_reader import Schema, classes, expected, first_sentence, follow, keys, kinds, places

_WIDTH = 120
_INTRODUCTION = """\
# Reference

All that a recipe can say: the keys of its tables, and the components that it can name, with what they take. Made by
`make schema` from the signatures and docstrings of the code; change those. In a terminal, `bin/sslrun list` tells the
same, and `bin/sslrun config explain CONFIG` what the keys are in one recipe and which lines set them.

The default of a key stands beside it. A key without one may be left out, unless it says *required*.

Editors that know taplo (Even Better TOML in VS Code) complete and check recipes by the `#:schema` line at their top;
for recipes that lie elsewhere, `bin/sslrun config schema --editor` prints what it should point to.
"""
_OF_FILES = """\
Two words belong to files and never reach a run: `extends` at the top, the file or files that this one goes over; and
`_delete_` in any table, what is inherited and shall not stay: `true` for all of the table, or a list of its keys.
"""


def reference(schema: Schema) -> str:
    """The whole document: the tables of a recipe, then the kinds of components, in the order of a recipe."""
    definitions, where = schema["$defs"], places(schema)
    tables = {f"#/$defs/{name}": where[name][0] for name in where if _is_table(definitions[name])}
    asked: dict[str, list[Key]] = {}
    for name, keys_of_it in where.items():
        if "x-tag" in definitions[name]:
            asked.setdefault(definitions[name]["title"], []).extend(keys_of_it)
    unions = {kind: definitions[kind] for kind in {**asked, **kinds(schema)}}
    parts = [_INTRODUCTION, _contents(list(tables.values()), unions)]
    for ref, key in tables.items():
        table = follow(definitions, {"$ref": ref})
        parts += [f"## {_header(key)}", *_docs(table), "" if key else _OF_FILES, _keys(definitions, table, tables)]
    for kind, union in unions.items():
        parts += [f"## {kind.capitalize()}", _usage(union, asked.get(kind, [])), _overview(definitions, union)]
        for name, option in classes(union).items():
            table = follow(definitions, option)
            parts += [f"### {name}", *_docs(table), _keys(definitions, table, tables), _source(table)]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def anchor(heading: str) -> str:
    """The fragment by which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _is_table(definition: Schema) -> bool:
    return "properties" in definition and "x-module" not in definition


def _header(key: Key) -> str:
    """How a table at a key begins in TOML."""
    if not key:
        return "The recipe"
    return f"`[[{show(key[:-1])}]]`" if key[-1] == "N" else f"`[{show(key)}]`"


def _contents(tables: list[Key], unions: dict[str, Schema]) -> str:
    lines = [f"- Tables: {', '.join(_link(_header(key)) for key in tables)}"]
    for kind, union in unions.items():
        lines.append(f"- {_link(kind.capitalize())}: {', '.join(map(_link, classes(union)))}")
    return "\n".join(_filled(line, "  ") for line in lines)


def _link(heading: str, text: str | None = None) -> str:
    return f"[{text or heading}](#{anchor(heading)})"


def _usage(union: Schema, asked: list[Key]) -> str:
    """Where components of a kind are named."""
    if not asked:
        return "Named on the command line, in lower case."
    where = ", ".join(f"`{show(key)}`" for key in dict.fromkeys(asked))
    return _filled(f"Named by `{union['x-tag']}` at {where}.")


def _overview(definitions: Schema, union: Schema) -> str:
    rows = ["| | |", "|---|---|"]
    for name, option in classes(union).items():
        rows.append(f"| {_link(name)} | {first_sentence(follow(definitions, option)['description'])} |")
    return "\n".join(rows)


def _docs(table: Schema) -> Iterator[str]:
    """A class's docs, paragraph by paragraph; indented ones are code in Markdown too."""
    for paragraph in [table["description"], *table.get("x-docs", "").split("\n\n")]:
        yield paragraph if paragraph.startswith("    ") else _filled(paragraph)


def _keys(definitions: Schema, table: Schema, tables: dict[str, Key]) -> str:
    """A line for each key; `tables` are the references to those that have a section of their own."""
    lines = []
    for key, asked in keys(table).items():
        given = f"{key} = {inline(asked['default'])}" if asked.get("default", {}) != {} else key
        takes = expected(definitions, asked, _link)
        ref = asked.get("$ref") or asked.get("items", {}).get("$ref")
        takes = _link(_header(tables[ref]), takes) if ref in tables else takes
        needed = "; *required*" if key in table["required"] else ""
        lines.append(_filled(f"- `{given}` ({takes}{needed}): {asked['description']}", "  "))
    return "\n".join(lines)


def _source(table: Schema) -> str:
    path = f"engine/{table['x-module'].replace('.', '/')}.py"
    return f"Code: [{path}](../{path})"


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(" ".join(text.split()), _WIDTH, subsequent_indent=indent, break_on_hyphens=False)
