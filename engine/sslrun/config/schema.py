"""Generates schema.json for everything that ships, and from it the editors' schema and docs/reference.md.

`python -m sslrun.config.schema` (`make schema`) writes these files; with `--check` it only says whether they are
current.
"""

import importlib
import json
import pkgutil
import sys
from pathlib import Path

from sslrun.config.annotations import describe
from sslrun.config.component import Component
from sslrun.config.editor import EDITOR_PATH, editor_schema
from sslrun.config.reference import reference
from sslrun.config.schema_reader import SCHEMA_PATH, Schema, as_text

RECIPE = "sslrun.recipe:Recipe"  # on an upper floor: named here, imported only when this module runs
ROOT = Path(__file__).parents[3]
REFERENCE_PATH = ROOT / "docs/reference.md"


def recipe_schema() -> Schema:
    """The schema of a recipe, with every component that ships."""
    import sslrun

    for module in pkgutil.walk_packages(sslrun.__path__, "sslrun."):
        importlib.import_module(module.name)
    module_name, _, recipe = RECIPE.partition(":")
    described = describe(getattr(importlib.import_module(module_name), recipe), "sslrun.")
    for kind in Component.__subclasses__():  # those that no key of a recipe asks for, too: `sslrun list` shows them
        if kind.__module__.startswith("sslrun."):
            described["$defs"] |= describe(kind, "sslrun.")["$defs"]
    described["$defs"] = dict(sorted(described["$defs"].items()))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}


def generated() -> dict[Path, str]:
    """The path of each generated file and the text that it should have."""
    schema = json.loads(as_text(recipe_schema()))  # as a reader of the file gets it: tuples are lists
    return {
        SCHEMA_PATH: as_text(schema),
        EDITOR_PATH: as_text(editor_schema(schema)),
        REFERENCE_PATH: reference(schema),
    }


def main(arguments: list[str]) -> int:
    """Writes the files; with `--check` compares them instead and returns 1 if one is out of date."""
    is_check, code = "--check" in arguments, 0
    for path, text in generated().items():
        is_current = path.is_file() and path.read_text(encoding="utf-8") == text
        if is_check:
            print(f"{path} is {'current' if is_current else 'out of date: run make schema'}")
            code = code if is_current else 1
        elif not is_current:
            path.write_text(text, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
