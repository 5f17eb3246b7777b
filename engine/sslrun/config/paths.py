"""Paths of a recipe: which values are paths, what a relative one starts from, and how messages name them.

A key is a path if its annotation is `FilePath` or `pathlib.Path`. A relative path starts from the folder in which
sslrun was started, and `~` is the home folder. Objects get absolute paths (`build`), and a run folder records them
(`with_absolute_paths`), so what opens the run from another folder reads the same files.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from sslrun.config.node import Layer, Node, plain, wrap
from sslrun.config.schema_reader import PATH, Schema, Setting, follow, parts

FilePath = Annotated[str, PATH]
"""Annotation of a constructor's argument that is a path: a string, which is absolute when the constructor gets it."""

_CODE = Layer(0, "", "", ())


def absolute(path: str) -> str:
    """A path as an absolute one: `~` is expanded, and a relative path starts from the current folder."""
    return os.path.abspath(os.path.expanduser(path)) if path else path


def stated(path: str | Path, what: str) -> str:
    """What is wrong with a path, for messages: a path below the current folder is relative, and the folder is named.

    Args:
        path: the path.
        what: what follows it, such as " does not exist".
    """
    folder = os.getcwd()
    if not Path(absolute(str(path))).is_relative_to(folder) or folder == "/":
        return f"{path}{what}"
    return f"{os.path.relpath(path)}{what} (relative to {folder})"


def with_absolute_paths(values: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """A resolved config with absolute paths. A path that has a default and is not set is set to it, so that all paths
    are there.

    Args:
        values: the config.
        schema: describes it, with the user's own components.
    """
    return _with_paths(values, schema, absolute)


def without_paths(values: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """A resolved config with an empty text for each path, to compare recipes that read the same files elsewhere."""
    return _with_paths(values, schema, lambda path: "")


def _with_paths(values: dict[str, Any], schema: Schema, change: Callable[[str], str]) -> dict[str, Any]:
    changed: dict[str, Any] = plain(_changed(schema.get("$defs", {}), Setting((), wrap(values, _CODE), schema), change))
    return changed


def _changed(definitions: Schema, setting: Setting, change: Callable[[str], str]) -> Node:
    node = setting.node
    assert node is not None
    if isinstance(node.value, str):
        return node._replace(value=change(node.value)) if is_path(definitions, setting.schema) else node
    if not isinstance(node.value, dict | list):
        return node
    below: dict[Any, Node] = {}
    for part, inner in parts(definitions, setting).items():
        if inner.node is not None:
            below[part] = _changed(definitions, inner, change)
        elif is_path(definitions, inner.schema) and isinstance(default := inner.schema.get("default"), str):
            below[part] = wrap(change(default), _CODE)
    return node._replace(value=list(below.values()) if isinstance(node.value, list) else below)


def is_path(definitions: Schema, schema: Schema) -> bool:
    """Whether a key of this schema may be a path."""
    schema = follow(definitions, schema)
    return PATH in schema or any(is_path(definitions, option) for option in schema.get("anyOf", ()))
