"""Finds what is legal in a config but misleads its reader.

Rules of inheritance hold for every file: it inherits over few steps, repeats no inherited value, and its bases agree.
The other rules compare a file's name with its content. A recipe or a benchmark does what its name says by the naming
convention, and a benchmark sets `[eval]` alone. An alias leads to a recipe. Neither it nor a file with any other name
(the quickstart, an experiment) is called like another method.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sslrun.config.dump import inline
from sslrun.config.files import File, line_up, shorten
from sslrun.config.lines import key_lines
from sslrun.config.load import Config, load
from sslrun.config.merge import DELETE, merge
from sslrun.config.naming import BENCHMARK, RECIPE, method_of, methods, mismatches
from sslrun.config.node import Key, Node, Origin, as_key, lookup, plain, same, show, walk
from sslrun.config.schema_reader import schema_of_parts
from sslrun.errors import UsageError

MAX_STEPS = 3  # of extends, from a recipe down to its last building block
BLOCKS, RECIPES, BENCHMARKS = "_base_", "selfsup", "benchmarks"  # folders
OF_BENCHMARKS = {"eval", "vars"}

_HAS_BATCH = re.compile(r"(^|.*[_-])\d+xb\d+([_-].*|$)")

Kind = Literal["recipe", "alias", "building block", "benchmark", "other"]
Findings = Iterator[tuple[int, str]]  # line and message


class Finding(NamedTuple):
    """One thing to put right: `str()` gives FILE:LINE: MESSAGE."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


def toml_files(paths: Sequence[str]) -> list[Path]:
    """The files, and all `.toml` files at any depth of the folders. Raises UsageError for a folder without any."""
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        inside = sorted(path.rglob("*.toml")) if path.is_dir() else [path]
        if not inside:
            raise UsageError(f"{path}: there is no .toml file in this folder")
        files |= dict.fromkeys(inside)
    return list(files)


def lint(path: Path) -> list[Finding]:
    """The findings in one file, by line. Raises UsageError if it cannot be read as a config."""
    tree = line_up(path)
    findings = [*_depth(path, tree), *_repetitions(tree), *_disagreeing_bases(tree), *_name(path, tree)]
    return sorted(Finding(shorten(tree[-1].path), line, message) for line, message in findings)


def kind_of(path: Path, file: File) -> Kind:
    """The kind of a file, by its folder, its name (the path as given) and its content: an alias only extends."""
    if BLOCKS in file.path.parts:
        return "building block"
    is_overlay = file.table.keys() <= OF_BENCHMARKS and all(_is_below(base, BENCHMARKS) for base in file.bases)
    if _is_below(file.path, BENCHMARKS) or (is_overlay and (file.table or file.bases)):
        return "benchmark"
    if not file.table and len(file.bases) == 1:
        return "alias"
    return "recipe" if _is_below(file.path, RECIPES) or _HAS_BATCH.fullmatch(path.stem) else "other"


def _is_below(path: Path, folder_name: str) -> bool:
    """Whether a path lies below a folder of this name that stands beside _base_; others may be called so by chance."""
    return any(folder.name == folder_name and (folder.parent / BLOCKS).is_dir() for folder in path.parents)


# Rules of inheritance


def _depth(path: Path, tree: list[File]) -> Findings:
    """Inheritance over too many steps. The step from an alias to its recipe does not count."""
    longest: dict[Path, list[str]] = {}
    for file in tree:  # bases come before the files that name them
        longest[file.path] = [file.path.name, *max((longest[base] for base in file.bases), key=len, default=[])]
    chain = longest[tree[-1].path][1 if kind_of(path, tree[-1]) == "alias" else 0 :]
    if len(chain) - 1 > MAX_STEPS:
        files = " -> ".join(chain)
        yield _extends(tree[-1]), f"inherits over {len(chain) - 1} steps, at most {MAX_STEPS} can be followed: {files}"


def _repetitions(tree: list[File]) -> Findings:
    """Values that would be the same if this file did not set them."""
    file, inherited = tree[-1], _merged(tree[:-1])
    lines = key_lines(file.text)
    for key, value in _written(file.table):
        before = lookup(inherited, key)
        if before is not None and same(plain(before), value):
            yield lines.get(key, 1), f"{show(key)}{_shown(value)} repeats what it inherits from {before.where}"


def _disagreeing_bases(tree: list[File]) -> Findings:
    """Keys for which the order of `extends` decides: bases set them differently and do not inherit from each other."""
    file = tree[-1]
    if len(file.bases) < 2:
        return
    known: dict[str, set[str]] = {}  # a file -> itself and all that it inherits from
    for one in tree:
        known[shorten(one.path)] = {shorten(one.path)}.union(*(known[shorten(base)] for base in one.bases))
    for key, node in walk(_merged(tree)):
        if isinstance(node.value, dict) or any(isinstance(part, int) for part in key):
            continue  # lists are compared as a whole
        for base in file.bases:
            origins = [origin for origin in node.origins if origin.layer.source in known[shorten(base)]]
            if origins and _disagree(origins[-1], node.where, known):
                values = " and ".join(f"{show(key)}{_shown(o.raw)} at {o}" for o in (origins[-1], node.where))
                yield _extends(file), f"bases disagree: {values}; set it here, or leave one of them out"
                break


def _disagree(one: Origin, winner: Origin, known: dict[str, set[str]]) -> bool:
    """Whether the winner sets another value without inheriting from the other file or editing a list of that file."""
    is_edit = isinstance(one.raw, dict) or isinstance(winner.raw, dict)
    return not (is_edit or one.layer.source in known[winner.layer.source] or same(one.raw, winner.raw))


def _merged(tree: list[File]) -> Node:
    """Files one over the other, with references as they are written."""
    merged = Node({}, ())
    for order, file in enumerate(tree):
        merged = merge(merged, file.node(order))
    return merged


def _written(table: dict[str, Any], key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every value below the tables of a file, except where its `_delete_` drops what was inherited."""
    dropped = table.get(DELETE, [])
    for part, value in table.items():
        if dropped is True or part == DELETE or (isinstance(dropped, list) and part in dropped):
            continue
        if isinstance(value, dict):
            yield from _written(value, (*key, part))
        else:
            yield (*key, part), value


# Rules of names


def _name(path: Path, tree: list[File]) -> Findings:
    """What contradicts the name of the file; a building block may have any."""
    file, kind = tree[-1], kind_of(path, tree[-1])
    if kind == "building block":
        return
    config = load(path, schema=schema_of_parts() if kind == "benchmark" else None)
    messages: list[tuple[str, str]] = []
    if kind == "recipe":
        messages += mismatches(path.stem, RECIPE, config)
    elif kind == "benchmark":
        for part in config.values.keys() - OF_BENCHMARKS:
            messages.append((part, f"{part} does not belong in a benchmark, which sets [eval] alone"))
        if _is_below(file.path, BENCHMARKS) or _HAS_BATCH.fullmatch(path.stem):
            messages += mismatches(path.stem, BENCHMARK, config)
    elif kind == "other":
        named, method = method_of(path.stem.replace("_", "-"), methods()), config.values["model"].get("type")
        is_claim = named and all(re.search(r"\d", word) for word in named[1])  # byol_accum8, not byol_or_not
        if named and is_claim and method in methods() and method != named[0]:
            messages.append(("model.type", f"the name says {named[0]}, model.type is {method}"))
    else:
        yield from _alias(path, file, next(one for one in tree if one.path == file.bases[0]))
    for key, message in messages:
        yield _placed(config, file, key, message)


def _alias(path: Path, file: File, target: File) -> Findings:
    kind = kind_of(target.path, target)
    if kind in ("alias", "building block"):
        article = "an" if kind == "alias" else "a"
        yield _extends(file), f"an alias stands for a recipe, and {shorten(target.path)} is {article} {kind}"
        return
    words, target_words = (one.stem.replace("_", "-").split("-") for one in (path, target.path))
    method = method_of("-".join(words), methods())
    if method is None:
        return  # it may have any other name
    end = len(words) - len(method[1])
    if words[:end] != target_words[:end]:
        yield _extends(file), f"{path.stem} is an alias of {target.path.stem}, which is another method"
    elif missing := [word for word in words[end:] if word not in target_words]:
        yield _extends(file), f"{path.stem} says {', '.join(missing)}, and its recipe {target.path.stem} does not"


def _placed(config: Config, file: File, key: str, message: str) -> tuple[int, str]:
    """A message about a key: on the line where this file sets it, else on its first line, naming the place."""
    node = lookup(config.root, as_key(key))
    if node is None:
        return 1, message
    lines = [origin.line for origin in node.origins if origin.layer.source == shorten(file.path) and origin.line]
    return (lines[-1], message) if lines else (1, f"{message} (set at {node.where})")


def _extends(file: File) -> int:
    """The line of `extends`, to blame for what comes from the bases."""
    return key_lines(file.text).get(("extends",), 1)


def _shown(value: Any) -> str:
    """` = value`; empty for a long value."""
    text = inline(value)
    return f" = {text}" if len(text) <= 60 else ""
