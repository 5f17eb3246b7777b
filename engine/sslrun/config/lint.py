"""Finds what is legal in a config but misleads its reader.

Rules of inheritance hold for every file: it inherits over few steps, repeats no inherited value, and its bases agree.
The other rules depend on the kind of file. A recipe does what its name says by the naming convention. An alias leads
to a recipe. A building block in `_base_` keeps to its subject. A benchmark sets `[eval]` alone and does what its name
says. A file with any other name (the quickstart, an experiment) is not called like another method.
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
from sslrun.config.naming import BENCHMARK, RECIPE, SCHEDULES, method_of, methods, mismatches, parse
from sslrun.config.node import Key, Node, Origin, as_key, lookup, plain, same, show
from sslrun.config.schema_reader import schema_of_parts
from sslrun.errors import UsageError

MAX_STEPS = 3  # of extends, from a recipe down to its last building block
BLOCKS, RECIPES, BENCHMARKS = "_base_", "selfsup", "benchmarks"  # folders

# What a building block may set, by its folder; one that lies beside these folders is a runtime, which sets the rest.
SUBJECTS: dict[str, tuple[Key, ...]] = {
    "models": (("model",), ("optimizer", "paramwise"), ("vars",)),
    "datasets": (("data",), ("monitor",), ("eval",), ("vars",)),
    "schedules": (("epochs",), ("max_iters",), ("global_batch",), ("optimizer",), ("lr",), ("vars",)),
}
NO_RUNTIME = ("model", "data", "optimizer", "lr", "epochs", "max_iters", "global_batch")
OF_BENCHMARKS = ("eval", "vars")

_HAS_BATCH = re.compile(r"(^|.*[_-])\d+xb\d+([_-].*|$)")
_SCHEDULE_BLOCK = re.compile(r"(?P<optimizer>[a-z]+)_(?P<schedule>[a-z]+lr)-(?P<epochs>\d+)e(_.*)?")

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
    try:
        tree = line_up(path)
        kind = kind_of(path, tree[-1])
        findings = [*_depth(tree, kind), *_repetitions(tree), *_disagreeing_bases(tree), *RULES[kind](path, tree)]
    except RecursionError:
        raise UsageError(f"{path}: inherits over too many files") from None
    return sorted(Finding(shorten(tree[-1].path), line, message) for line, message in findings)


def kind_of(path: Path, file: File) -> Kind:
    """The kind of a file, by its folder, its name (the path as given) and its content: an alias only extends."""
    if BLOCKS in file.path.parts:
        return "building block"
    is_overlay = file.table.keys() <= set(OF_BENCHMARKS) and all(_is_below(base, BENCHMARKS) for base in file.bases)
    if _is_below(file.path, BENCHMARKS) or (is_overlay and (file.table or file.bases)):
        return "benchmark"
    if not file.table and len(file.bases) == 1:
        return "alias"
    return "recipe" if _is_below(file.path, RECIPES) or _HAS_BATCH.fullmatch(path.stem) else "other"


def _is_below(path: Path, folder_name: str) -> bool:
    """Whether a path lies below a folder of this name that stands beside _base_; others may be called so by chance."""
    return any(folder.name == folder_name and (folder.parent / BLOCKS).is_dir() for folder in path.parents)


# Rules of inheritance


def _depth(tree: list[File], kind: Kind) -> Findings:
    """Inheritance over too many steps. The step from an alias to its recipe does not count."""
    longest: dict[Path, list[str]] = {}
    for file in tree:  # bases come before the files that name them
        longest[file.path] = [file.path.name, *max((longest[base] for base in file.bases), key=len, default=[])]
    chain = longest[tree[-1].path][1 if kind == "alias" else 0 :]
    if len(chain) - 1 > MAX_STEPS:
        files = " -> ".join(chain)
        yield _extends(tree[-1]), f"inherits over {len(chain) - 1} steps, at most {MAX_STEPS} can be followed: {files}"


def _repetitions(tree: list[File]) -> Findings:
    """Values that would be the same if this file did not set them."""
    file, inherited = tree[-1], _merged(tree[:-1])
    lines = key_lines(file.text)
    for key, value, is_fresh in _written(file.table):
        before = lookup(inherited, key)
        if before is not None and not is_fresh and same(plain(before), value):
            yield lines.get(key, 1), f"{show(key)}{_shown(value)} repeats what it inherits from {before.where}"


def _disagreeing_bases(tree: list[File]) -> Findings:
    """Keys for which the order of `extends` decides: bases set them differently and do not inherit from each other."""
    file = tree[-1]
    if len(file.bases) < 2:
        return
    known: dict[str, set[str]] = {}  # a file -> itself and all that it inherits from
    for one in tree:
        known[shorten(one.path)] = {shorten(one.path)}.union(*(known[shorten(base)] for base in one.bases))
    for key, node in _leaves(_merged(tree)):
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


def _written(table: dict[str, Any], key: Key = (), is_fresh: bool = False) -> Iterator[tuple[Key, Any, bool]]:
    """Every value below the tables of a file; `is_fresh` if its `_delete_` dropped what was inherited."""
    dropped = table.get(DELETE, [])
    for part, value in table.items():
        fresh = is_fresh or dropped is True or (isinstance(dropped, list) and part in dropped)
        if isinstance(value, dict):
            yield from _written(value, (*key, part), fresh)
        elif part != DELETE:
            yield (*key, part), value, fresh


def _leaves(node: Node, key: Key = ()) -> Iterator[tuple[Key, Node]]:
    """Every value below the tables of merged files."""
    if isinstance(node.value, dict):
        for part, below in node.value.items():
            yield from _leaves(below, (*key, part))
    else:
        yield key, node


# Rules of the kinds of file


def _recipe(path: Path, tree: list[File]) -> Findings:
    yield from _second_primitive(tree)
    yield from _name(path, tree[-1], load(path), RECIPE)


def _benchmark(path: Path, tree: list[File]) -> Findings:
    config = load(path, schema=schema_of_parts())
    for part in config.values:
        if part not in OF_BENCHMARKS:
            yield _placed(config, tree[-1], part, f"{part} does not belong in a benchmark, which sets [eval] alone")
    if _is_below(tree[-1].path, BENCHMARKS) or _HAS_BATCH.fullmatch(path.stem):
        yield from _name(path, tree[-1], config, BENCHMARK)


def _name(path: Path, file: File, config: Config, form: str) -> Findings:
    """Whether the name follows the convention, and the file does what it says."""
    try:
        name = parse(path.stem, form)
    except ValueError as error:
        yield 1, f"the name does not follow the convention: {error} (see `sslrun config lint convention`)"
        return
    for mismatch in mismatches(name, config):
        yield _placed(config, file, mismatch.key, mismatch.message)


def _alias(path: Path, tree: list[File]) -> Findings:
    load(path)
    file = tree[-1]
    target = next(one for one in tree if one.path == file.bases[0])
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


def _other(path: Path, tree: list[File]) -> Findings:
    config = load(path)
    yield from _second_primitive(tree)
    named, method = method_of(path.stem.replace("_", "-"), methods()), config.values["model"].get("type")
    is_claim = named and all(re.search(r"\d", word) for word in named[1])  # byol_accum8, not byol_or_not
    if named and is_claim and method in methods() and method != named[0]:
        yield _placed(config, tree[-1], "model.type", f"the name says {named[0]}, model.type is {method}")


def _block(path: Path, tree: list[File]) -> Findings:
    file = tree[-1]
    folder, lines = file.path.parent.name, key_lines(file.text)
    for base in file.bases:
        if BLOCKS not in base.parts:
            yield _extends(file), f"a building block extends only building blocks, and {shorten(base)} is none"
    for key, _, _ in _written(file.table):
        if folder in SUBJECTS and not any(key[: len(subject)] == subject for subject in SUBJECTS[folder]):
            yield lines.get(key, 1), f"{show(key)} does not belong in a building block of {BLOCKS}/{folder}"
        elif folder == BLOCKS and key[0] in NO_RUNTIME:
            yield lines.get(key, 1), f"{show(key)} does not belong in runtime settings"
    name = _SCHEDULE_BLOCK.fullmatch(path.stem)
    if folder != "schedules" or name is None:
        return
    says: dict[Key, str] = {  # the data set says only what the schedule was made for
        ("optimizer", "type"): name["optimizer"],
        ("lr", "policy"): SCHEDULES.get(name["schedule"], name["schedule"]),
        ("epochs",): name["epochs"],
    }
    for key, value in says.items():
        node = lookup(_merged(tree), key)
        if node is not None and str(node.value).lower() != value.lower():
            yield lines.get(key, 1), f"the name says {value}, {show(key)} is {node.value}"


def _second_primitive(tree: list[File]) -> Findings:
    """Another config of the folder that is composed of building blocks and trains the same networks."""
    file = tree[-1]
    if not _is_primitive(file):
        return
    twins = []
    for path in sorted(file.path.parent.glob("*.toml")):
        try:
            other = line_up(path)
            if other[-1].path != file.path and _is_primitive(other[-1]) and _networks(other) == _networks(tree):
                twins.append(path.name)
        except UsageError:  # reported when that file is checked
            continue
    if twins:
        advice = "let one config of a folder be primitive and the others extend it"
        yield _extends(file), f"is composed of building blocks, and so is {', '.join(twins)}: {advice}"


def _is_primitive(file: File) -> bool:
    return BLOCKS not in file.path.parts and any(BLOCKS in base.parts for base in file.bases)


def _networks(tree: list[File]) -> list[Any]:
    """The classes of the method and of its backbone."""
    nodes = [lookup(_merged(tree), ("model", *below)) for below in (("type",), ("backbone", "type"))]
    return [None if node is None else node.value for node in nodes]


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


RULES = {"recipe": _recipe, "alias": _alias, "building block": _block, "benchmark": _benchmark, "other": _other}
