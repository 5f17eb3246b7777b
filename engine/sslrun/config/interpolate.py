"""Resolves `${...}` in strings, after all merging and every `--set`, so an override reaches all that refers to it.

    ${a.b.0.c}            any value of the merged config
    ${env:NAME}           an environment variable, typed like `--set`; ${env:NAME,default} if it may be unset
    ${config.name}        the started recipe's full name
    ${config.dir}         the folder of the file that contains the text
    $${                   a literal ${

A reference that is the whole string takes the value with its type, tables and lists as deep copies. Inside a longer
string it must be a scalar. References may refer to references, and each can double what the last one made, so all that
they make together has a limit.
"""

import os
import re
from dataclasses import dataclass, field
from typing import NoReturn

from sslrun.config.merge import kind, nearest
from sslrun.config.node import Key, Node, child, names, parse_key, show, wrap
from sslrun.config.override import typed
from sslrun.errors import UsageError

REFERENCE = re.compile(r"(?P<literal>\$\$\{)|\$\{(?P<target>[^{}]*)\}|(?P<open>\$\{)")


MAX_SIZE = 1 << 20  # values and characters that all references make together; a file has at most as many bytes


@dataclass
class _Scope:
    """The merged tree, the recipe's name, the strings being resolved (outermost first), the resolved ones, the sizes of
    tables and lists by identity, and the size of what references have made."""

    root: Node
    name: str
    trail: list[Key] = field(default_factory=list)
    done: dict[Key, Node] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    made: int = 0


def resolve(root: Node, name: str) -> Node:
    """The tree with every reference replaced; origins remain those of the referring string."""
    return _deep(_Scope(root, name), root, ())


def references(text: str) -> list[str]:
    """The keys of the config that a text refers to, in order."""
    targets = [match["target"] for match in REFERENCE.finditer(text) if match["target"] is not None]
    return [target.strip() for target in targets if not target.strip().startswith(("env:", "config."))]


def _deep(scope: _Scope, node: Node, key: Key) -> Node:
    if isinstance(node.value, dict):
        return node._replace(value={k: _deep(scope, v, (*key, k)) for k, v in node.value.items()})
    if isinstance(node.value, list):
        return node._replace(value=[_deep(scope, v, (*key, i)) for i, v in enumerate(node.value)])
    return _string(scope, node, key) if _refers(node) else node


def _refers(node: Node) -> bool:
    return isinstance(node.value, str) and "${" in node.value


def _string(scope: _Scope, node: Node, key: Key) -> Node:
    """A string with its references resolved. Reaching it again while it is being resolved is a cycle: UsageError."""
    if key in scope.done:
        return scope.done[key]
    if key in scope.trail:
        cycle = [*scope.trail[scope.trail.index(key) :], key]
        _fail(node, key, f"references go in a circle: {' -> '.join(map(show, cycle))}")
    scope.trail.append(key)
    whole = REFERENCE.fullmatch(node.value)
    if whole and whole["target"] is not None:
        target = _target(scope, node, key, whole["target"])
        _add(scope, node, key, _size(scope, target))
        value = target.value
    else:
        value = REFERENCE.sub(lambda match: _inside(scope, node, key, match), node.value)
    scope.trail.pop()
    scope.done[key] = node._replace(value=value)
    return scope.done[key]


def _inside(scope: _Scope, node: Node, key: Key, match: re.Match[str]) -> str:
    """The text that replaces one reference in a longer string."""
    if match["literal"]:
        return "${"
    if match["open"]:
        _fail(node, key, f"{node.value!r} has a ${{ without its }}; a literal ${{ is written $${{")
    target = match["target"].strip()
    if target.startswith("env:"):
        text = _environment(node, key, target)
    else:
        value = _target(scope, node, key, target).value
        if isinstance(value, dict | list):
            _fail(node, key, f"${{{target}}} is {kind(value)} and can only be a whole string, not part of one")
        text = str(value).lower() if isinstance(value, bool) else str(value)
    _add(scope, node, key, len(text))
    return text


def _add(scope: _Scope, node: Node, key: Key, size: int) -> None:
    """Counts what a reference has made."""
    scope.made += size
    if scope.made > MAX_SIZE:
        _fail(node, key, f"references make more than {MAX_SIZE:,} values and characters")


def _size(scope: _Scope, node: Node) -> int:
    """Number of values and characters of a node. Parts that are shared are counted each time, but visited once."""
    if isinstance(node.value, str):
        return 1 + len(node.value)
    if not isinstance(node.value, dict | list):
        return 1
    if id(node.value) not in scope.sizes:
        inside = node.value.values() if isinstance(node.value, dict) else node.value
        scope.sizes[id(node.value)] = 1 + sum(_size(scope, part) for part in inside)
    return scope.sizes[id(node.value)]


def _target(scope: _Scope, node: Node, key: Key, target: str) -> Node:
    """The resolved value of one reference."""
    target = target.strip()
    if target in ("config.name", "config.dir"):
        return node._replace(value=scope.name if target == "config.name" else node.where.layer.folder)
    text = _environment(node, key, target) if target.startswith("env:") else None
    try:
        if text is not None:
            return wrap(typed(text), node.where.layer)
        parts = parse_key(target)
    except ValueError as error:
        _fail(node, key, f"${{{target}}}: {error}")
    return _referred(scope, node, key, parts)


def _referred(scope: _Scope, node: Node, key: Key, parts: Key) -> Node:
    """The resolved value at a key that `node` refers to; strings on the way to it may be references too."""
    here, is_resolved = scope.root, False
    path: Key = ()
    for part in parts:
        if _refers(here) and not is_resolved:
            here, is_resolved = _string(scope, here, path), True
        step = child(here, part)
        if step is None:
            near = nearest(str(part), names(here))
            _fail(node, key, f"${{{show(parts)}}}: there is no {show((*path, part))}{near}")
        path, here = (*path, step[0]), step[1]
    return here if is_resolved else _deep(scope, here, path)


def _environment(node: Node, key: Key, target: str) -> str:
    variable, comma, default = target.removeprefix("env:").partition(",")
    name = variable.strip()
    value = os.environ.get(name, default.strip() if comma else None)
    if value is None:
        _fail(node, key, f"the environment variable {name} is not set; ${{env:{name},default}} gives a default")
    return value


def _fail(node: Node, key: Key, message: str) -> NoReturn:
    raise UsageError(f"{node.where}: {show(key)}: {message}".replace("\n", "\\n"))
