"""Builds objects from checked tables, by type annotations.

A table for a dataclass or a component becomes a call with the table's keys as keyword arguments; the tables inside it
become objects first, and paths become absolute. Absent keys keep the code's defaults. Built-in classes are imported
when a config names them, a user's own through `custom_imports`. The schema is derived from the classes themselves, so a
user's own components, which `load` cannot check, are checked here.
"""

import dataclasses
import importlib
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from sslrun.config.annotations import describe, names_class, parameters
from sslrun.config.check import TAGS, check_part, file_of, problems
from sslrun.config.node import Key, Node, find, lookup, plain, show, walk
from sslrun.config.paths import absolute
from sslrun.config.schema_reader import PATH, committed_schema
from sslrun.errors import UsageError


def build(root: Node, annotation: Any, key: Key = ()) -> Any:
    """The value at `key` as an object of the annotated type; an absent table for a dataclass gives all defaults.

    Raises UsageError: one line with file:line, also if a constructor raises ValueError or RuntimeError.
    """
    _import_custom(root)
    node = lookup(root, key)
    if node is None:
        node = Node({}, root.origins) if dataclasses.is_dataclass(annotation) else find(root, key)
    _import_named(node)
    check_part(node, describe(annotation), key)
    return _object(annotation, node, key)


def _object(annotation: Any, node: Node, key: Key) -> Any:
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if annotation is float:
        return float(node.value)
    if annotation is Path:
        return Path(absolute(node.value))
    if origin is Annotated:
        value = _object(arguments[0], node, key)
        return absolute(value) if PATH in annotation.__metadata__ else value
    if origin in (Union, types.UnionType):
        options = [option for option in arguments if option is not types.NoneType]
        return _object(next(option for option in options if not any(problems(node, describe(option)))), node, key)
    if origin in (list, tuple, Sequence) and arguments:
        inner = [arguments[0]] * len(node.value) if origin is not tuple or arguments[-1] is ... else arguments
        objects = [_object(a, n, (*key, i)) for i, (a, n) in enumerate(zip(inner, node.value, strict=True))]
        return tuple(objects) if origin is tuple else objects
    if origin is dict and arguments:
        return {part: _object(arguments[1], value, (*key, part)) for part, value in node.value.items()}
    if names_class(annotation):
        return _call(annotation.registry[node.value[annotation.tag].value], node, key, annotation.tag)
    if dataclasses.is_dataclass(annotation):
        return _call(annotation, node, key)
    return plain(node)


def _call(cls: Any, node: Node, key: Key, tag: str | None = None) -> Any:
    expected = parameters(cls)
    given = {part: value for part, value in node.value.items() if part != tag}
    arguments = {part: _object(expected[part].annotation, value, (*key, part)) for part, value in given.items()}
    try:
        return cls(**arguments)
    except (ValueError, RuntimeError) as error:  # torch refuses sizes with a RuntimeError
        place = f"{node.where}: {show(key)}" if key else file_of(node).layer.source
        raise UsageError(f"{place}: {str(error).splitlines()[0]}") from error


def _import_custom(root: Node) -> None:
    """Imports the user's own modules; the current folder is searched too, as `python -m` does.

    What opens a recipe that may be somebody else's checks it before: `sslrun.allowed_imports`.
    """
    imports = root.value.get("custom_imports")
    for index, module in enumerate(imports.value if imports else []):
        if module.value in sys.modules:
            continue
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(module.value)
        except ImportError as error:
            place = f"{module.where}: custom_imports.{index}"
            raise UsageError(f"{place}: cannot import {module.value}: {error}") from error


def _import_named(node: Node) -> None:
    """Imports the modules of the built-in classes that the value names at any depth."""
    definitions = committed_schema().get("$defs", {}).values()
    modules = [(table["title"], table["x-module"]) for table in definitions if "x-module" in table]
    tables = [below.value for _, below in walk(node) if isinstance(below.value, dict)]
    named = {table[tag].value for table in tables for tag in TAGS if tag in table and isinstance(table[tag].value, str)}
    for title, module in modules:
        if title in named:
            importlib.import_module(module)
