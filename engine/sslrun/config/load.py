"""Loads a config: read the files, merge them and the overrides, resolve references, check."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sslrun.config import recipes
from sslrun.config.check import check, kept_keys
from sslrun.config.files import IN_CODE, File, in_code, line_up, recipe_name
from sslrun.config.interpolate import resolve
from sslrun.config.merge import merge
from sslrun.config.node import Key, Layer, Node, Origin, as_key, find, lookup, plain, wrap
from sslrun.config.override import parse_override
from sslrun.config.paths import with_absolute_paths
from sslrun.config.schema_reader import Schema, committed_schema
from sslrun.config.tables import toml
from sslrun.errors import UsageError


@dataclass(frozen=True)
class Config:
    """One recipe, merged, resolved and checked.

    Attributes:
        path: the started file.
        name: the recipe's full name; for an alias, the name of its recipe.
        values: plain dicts, lists and scalars.
        files: every file read, in merge order; the started one is last.
        notes: remarks for the user that are no errors, one line each.
        root: the values as nodes, each with the places that set it.
    """

    path: Path
    name: str
    values: dict[str, Any]
    files: list[Path]
    notes: list[str]
    root: Node

    def origins(self, key: str | Key) -> list[Origin]:
        """The places that set a key (`"data.views.0"` or its parts), in merge order: the last one wins."""
        return list(find(self.root, as_key(key)).origins)

    @contextlib.contextmanager
    def naming_places(self) -> Iterator[None]:
        """Within it, a UsageError that begins with a key of the recipe gets the file and the line that set the key."""
        try:
            yield
        except UsageError as error:
            named = re.match(r"[a-z_]+(\.\w+)*", str(error))
            node = None if named is None else lookup(self.root, as_key(named[0]))
            if node is None:
                raise
            raise UsageError(f"{node.where}: {error}") from error

    def build(self, annotation: Any, key: str | Key = "") -> Any:
        """The value at a key as an object of the annotated type, see `sslrun.config.build`."""
        from sslrun.config.build import build

        return build(self.root, annotation, as_key(key))

    def with_absolute_paths(self, annotation: Any) -> "Config":
        """This config with absolute paths in `values`, as a run records it; `root` and `path` keep what was typed.

        Args:
            annotation: class of the whole config; the modules of its components have been imported (`build` does it).
        """
        from sslrun.config.annotations import describe

        return replace(self, values=with_absolute_paths(self.values, describe(annotation)))


def load(
    path: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    schema: Schema | None = None,
    overlays: Sequence[str | Path] = (),
    name: str | None = None,
) -> Config:
    """Reads a recipe.

    Args:
        path: a TOML file, or the name of a recipe that ships, with or without `sslrun:` before it; or a table, whose
            `extends` starts from the current folder.
        overrides: texts of `--set`, `KEY=VALUE` each, merged after all files in this order.
        schema: schema to check against; None means the committed schema.json.
        overlays: further TOML files, each merged, with the files that it extends, over all files before it.
        name: the recipe's name; by default that of the file, and for a table that of the one recipe that it extends, or
            "recipe".

    Raises:
        UsageError: one line with file:line, for any error in the files or overrides.
    """
    try:
        started = in_code(toml(path, "")) if isinstance(path, Mapping) else recipes.located(path)
        return _load(started, overlays, overrides, committed_schema() if schema is None else schema, name)
    except RecursionError:
        shown = IN_CODE if isinstance(path, Mapping) else path
        raise UsageError(f"{shown}: tables, lists or references are nested too deep") from None


def _load(
    started: Path | File, overlays: Sequence[str | Path], overrides: Sequence[str], schema: Schema, name: str | None
) -> Config:
    recipe = line_up(started)
    files = recipe + [file for overlay in overlays for file in line_up(Path(overlay))]
    layers = [file.node(order) for order, file in enumerate(files)]
    last = layers[-1].where.layer
    layers += [parse_override(text, len(files) + place, last) for place, text in enumerate(overrides)]
    merged: Node | None = None
    for layer in layers:
        merged = merge(merged, layer)
    assert merged is not None
    path = started.path if isinstance(started, File) else started
    name = recipe_name(path, recipe) if name is None else name
    if not name.strip("."):
        raise UsageError(f"{path}: a run has the name of its recipe, and {name!r} names a folder above: rename it")
    if os.sep in name:
        raise UsageError(f"{path}: a run has the name of its recipe, and {name!r} is a path: name a folder in work_dir")
    root = resolve(merged, name)
    check(root, schema)
    return Config(path, name, plain(root), [file.path for file in files], kept_keys(root), root)


def composed(values: dict[str, Any], name: str, source: str) -> Config:
    """A config that code composed from resolved ones.

    Args:
        values: its values, without references.
        name: the recipe's name.
        source: text that stands for the file in messages.
    """
    root = wrap(values, Layer(0, source, os.getcwd(), (source,)))
    check(root, committed_schema())
    return Config(Path(source), name, plain(root), [], [], root)
