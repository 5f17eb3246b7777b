"""What is legal in a config but misleads whoever reads it.

Rules of inheritance hold for every file: not too deep, no value that repeats an inherited one, no bases that disagree.
What else is asked depends on the kind of file: a recipe does what its name says by the naming convention, an alias
leads to a recipe, a building block in `_base_` keeps to its subject, a benchmark sets `[eval]` alone and does what its
name says, and a file with a free name (the quickstart, what someone tries out) may be called anything but another
method.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sslrun.config.claims import benchmark_contradictions, contradictions, methods
from sslrun.config.dump import inline
from sslrun.config.files import File, line_up, shorten
from sslrun.config.lines import key_lines
from sslrun.config.load import Config, load
from sslrun.config.merge import DELETE, merge
from sslrun.config.naming import SCHEDULES, method_of, parse, parse_benchmark
from sslrun.config.node import Key, Node, Origin, as_key, lookup, plain, show
from sslrun.config.schema_reader import schema_of_parts
from sslrun.errors import UsageError

MAX_STEPS = 3  # of extends, from a recipe down to its last building block
BLOCKS, RECIPES, BENCHMARKS = "_base_", "selfsup", "benchmarks"

# What a building block may set, by the folder it lies in; one beside the folders is a runtime, which sets the rest.
SUBJECTS: dict[str, tuple[Key, ...]] = {
    "models": (("model",), ("optimizer", "paramwise"), ("vars",)),
    "datasets": (("data",), ("monitor",), ("eval",), ("vars",)),
    "schedules": (("epochs",), ("max_iters",), ("global_batch",), ("optimizer",), ("lr",), ("vars",)),
}
BENCHMARK = ("eval", "vars")  # the tables of a benchmark
NO_RUNTIME = ("model", "data", "optimizer", "lr", "epochs", "max_iters", "global_batch")

_HAS_BATCH = re.compile(r"(^|.*[_-])\d+xb\d+([_-].*|$)")
_SCHEDULE_BLOCK = re.compile(r"(?P<optimizer>[a-z]+)_(?P<schedule>[a-z]+lr)-(?P<epochs>\d+)e(_.*)?")

Kind = Literal["recipe", "alias", "building block", "benchmark", "free name"]
Found = Iterator[tuple[int, str]]  # line and message


class Finding(NamedTuple):
    """One thing to put right."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


def toml_files(paths: Sequence[str]) -> list[Path]:
    """The files themselves and all `.toml` files at any depth of the folders. Raises UsageError for an empty folder."""
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        inside = sorted(path.rglob("*.toml")) if path.is_dir() else [path]
        if not inside:
            raise UsageError(f"{path}: there is no .toml file in this folder")
        found |= dict.fromkeys(inside)
    return list(found)


def lint(path: Path) -> list[Finding]:
    """What is to be put right in one file, by line. Raises UsageError where it cannot be read as a config."""
    try:
        return _lint(path)
    except RecursionError:
        raise UsageError(f"{path}: inherits over too many files") from None


def _lint(path: Path) -> list[Finding]:
    tree = line_up(path)
    file = tree[-1]
    kind = kind_of(path, file)
    found = [*_depth(tree, kind), *_repetitions(tree), *_disagreeing_bases(tree), *RULES[kind](path, tree)]
    return sorted(Finding(shorten(file.path), line, message) for line, message in found)


def kind_of(path: Path, file: File) -> Kind:
    """What a file is, by its place, its name (the path as given) and, an alias, by saying nothing but `extends`."""
    if BLOCKS in file.path.parts:
        return "building block"
    is_overlay = file.table.keys() <= set(BENCHMARK) and all(_is_below(base, BENCHMARKS) for base in file.bases)
    if _is_below(file.path, BENCHMARKS) or (is_overlay and (file.table or file.bases)):
        return "benchmark"
    if not file.table and len(file.bases) == 1:
        return "alias"
    return "recipe" if _is_below(file.path, RECIPES) or _HAS_BATCH.fullmatch(path.stem) else "free name"


def _is_below(path: Path, folder_name: str) -> bool:
    """In such a folder, and that beside _base_: a checkout in somebody's folder "selfsup" is not taken for it."""
    return any(folder.name == folder_name and (folder.parent / BLOCKS).is_dir() for folder in path.parents)


# Rules of inheritance


def _depth(tree: list[File], kind: Kind) -> Found:
    """Inheritance that nobody can follow. The step from an alias to its recipe does not count."""
    longest: dict[Path, list[str]] = {}
    for file in tree:  # bases come before the files that name them
        longest[file.path] = [file.path.name, *max((longest[base] for base in file.bases), key=len, default=[])]
    chain = longest[tree[-1].path][1 if kind == "alias" else 0 :]
    if len(chain) - 1 > MAX_STEPS:
        files = " -> ".join(chain)
        yield _extends(tree[-1]), f"inherits over {len(chain) - 1} steps, at most {MAX_STEPS} can be followed: {files}"


def _repetitions(tree: list[File]) -> Found:
    """Values that would be the same if this file did not set them."""
    file, inherited = tree[-1], _merged(tree[:-1])
    lines = key_lines(file.text)
    for key, value, is_fresh in _written(file.table):
        before = lookup(inherited, key)
        if before is not None and not is_fresh and _same(plain(before), value):
            yield lines.get(key, 1), f"{show(key)}{_shown(value)} repeats what it inherits from {before.where}"


def _disagreeing_bases(tree: list[File]) -> Found:
    """Keys for which the order of `extends` decides: bases set them differently, unaware of each other."""
    file = tree[-1]
    if len(file.bases) < 2:
        return
    known: dict[str, set[str]] = {}  # a file -> itself and all that it inherits from
    for one in tree:
        known[shorten(one.path)] = {shorten(one.path)}.union(*(known[shorten(base)] for base in one.bases))
    for key, node in _leaves(_merged(tree)):
        for base in file.bases:
            said = [origin for origin in node.origins if origin.layer.source in known[shorten(base)]]
            if said and _disagree(said[-1], node.where, known):
                values = " and ".join(f"{show(key)}{_shown(o.raw)} at {o}" for o in (said[-1], node.where))
                yield _extends(file), f"bases disagree: {values}; set it here, or leave one of them out"
                break


def _disagree(one: Origin, winner: Origin, known: dict[str, set[str]]) -> bool:
    """Whether the winner says something else without inheriting from the other file or editing a list of its."""
    is_edit = isinstance(one.raw, dict) or isinstance(winner.raw, dict)
    is_aware = one.layer.source in known[winner.layer.source]
    return not (is_edit or is_aware or _same(one.raw, winner.raw))


def _merged(tree: list[File]) -> Node:
    """Files one over the other, references as they are written."""
    merged = Node({}, ())
    for order, file in enumerate(tree):
        merged = merge(merged, file.node(order))
    return merged


def _written(table: dict[str, Any], key: Key = (), is_fresh: bool = False) -> Iterator[tuple[Key, Any, bool]]:
    """Every value that a file sets, tables taken apart; `is_fresh` where its `_delete_` dropped what was inherited."""
    dropped = table.get(DELETE, [])
    for part, value in table.items():
        if part == DELETE:
            continue
        fresh = is_fresh or dropped is True or (isinstance(dropped, list) and part in dropped)
        if isinstance(value, dict):
            yield from _written(value, (*key, part), fresh)
        else:
            yield (*key, part), value, fresh


def _leaves(node: Node, key: Key = ()) -> Iterator[tuple[Key, Node]]:
    """Every value of merged files, tables taken apart."""
    if isinstance(node.value, dict):
        for part, below in node.value.items():
            yield from _leaves(below, (*key, part))
    else:
        yield key, node


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; a boolean is no number."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


# Rules of the kinds of file


def _recipe(path: Path, tree: list[File]) -> Found:
    config = load(path)
    yield from _second_primitive(tree)
    try:
        name = parse(path.stem)
    except ValueError as error:
        yield 1, f"the name does not follow the convention: {error} (see `sslrun config lint convention`)"
        return
    for claim in contradictions(name, config):
        yield _placed(config, tree[-1], claim.key, claim.message)


def _alias(path: Path, tree: list[File]) -> Found:
    load(path)
    file = tree[-1]
    target = next(one for one in tree if one.path == file.bases[0])
    kind = kind_of(target.path, target)
    if kind in ("alias", "building block"):
        article = "an" if kind == "alias" else "a"
        yield _extends(file), f"an alias stands for a recipe, and {shorten(target.path)} is {article} {kind}"
        return
    short, full = (one.stem.replace("_", "-") for one in (path, target.path))
    if method_of(short, methods()) and not f"{full}-".startswith(f"{short}-"):
        yield _extends(file), f"{path.stem} is an alias of {target.path.stem}, which is another method"


def _free_name(path: Path, tree: list[File]) -> Found:
    config = load(path)
    yield from _second_primitive(tree)
    said, kind = method_of(path.stem.replace("_", "-"), methods()), config.values["model"].get("type")
    if said and not said[1] and kind in methods() and kind != said[0]:
        yield _placed(config, tree[-1], "model.type", f"the name says {said[0]}, model.type is {kind}")


def _benchmark(path: Path, tree: list[File]) -> Found:
    config = load(path, schema=schema_of_parts())
    for part in config.values:
        if part not in BENCHMARK:
            yield _placed(config, tree[-1], part, f"{part} is no business of a benchmark, which sets [eval] alone")
    if not _is_below(tree[-1].path, BENCHMARKS) and not _HAS_BATCH.fullmatch(path.stem):
        return  # what someone tries out may be called anything
    try:
        name = parse_benchmark(path.stem)
    except ValueError as error:
        yield 1, f"the name does not follow the convention: {error} (see `sslrun config lint convention`)"
        return
    for claim in benchmark_contradictions(name, config):
        yield _placed(config, tree[-1], claim.key, claim.message)


def _block(path: Path, tree: list[File]) -> Found:
    file = tree[-1]
    folder, lines = file.path.parent.name, key_lines(file.text)
    for base in file.bases:
        if BLOCKS not in base.parts:
            yield _extends(file), f"a building block extends only building blocks, and {shorten(base)} is none"
    for key, _, _ in _written(file.table):
        if folder in SUBJECTS and not _begins(key, SUBJECTS[folder]):
            yield lines.get(key, 1), f"{show(key)} is no business of a building block in {BLOCKS}/{folder}"
        elif folder == BLOCKS and key[0] in NO_RUNTIME:
            yield lines.get(key, 1), f"{show(key)} is no business of runtime settings"
    name = _SCHEDULE_BLOCK.fullmatch(path.stem)
    if folder == "schedules" and name:
        yield from _schedule_block(name, _merged(tree), lines)


def _schedule_block(name: re.Match[str], root: Node, lines: dict[Key, int]) -> Found:
    """`sgd_coslr-200e_in1k`: optimizer, policy and epochs; the data set says only what it was made for."""
    said: dict[Key, str] = {
        ("optimizer", "type"): name["optimizer"],
        ("lr", "policy"): SCHEDULES.get(name["schedule"], name["schedule"]),
        ("epochs",): name["epochs"],
    }
    for key, value in said.items():
        node = lookup(root, key)
        if node is not None and str(node.value).lower() != value.lower():
            yield lines.get(key, 1), f"the name says {value}, {show(key)} is {node.value}"


def _second_primitive(tree: list[File]) -> Found:
    """Another config of the folder that is put together from building blocks and trains the same networks."""
    file = tree[-1]
    if not _is_primitive(file):
        return
    twins = []
    for path in sorted(file.path.parent.glob("*.toml")):
        try:
            other = line_up(path)
            if other[-1].path != file.path and _is_primitive(other[-1]) and _networks(other) == _networks(tree):
                twins.append(path.name)
        except UsageError:  # that is said when the other is looked at
            continue
    if twins:
        advice = "let one config of a folder be primitive and the others extend it"
        yield _extends(file), f"is put together from building blocks, and so is {', '.join(twins)}: {advice}"


def _is_primitive(file: File) -> bool:
    return BLOCKS not in file.path.parts and any(BLOCKS in base.parts for base in file.bases)


def _networks(tree: list[File]) -> list[Any]:
    """The classes of the method and of its backbone."""
    root = _merged(tree)
    found = [lookup(root, ("model", *below)) for below in (("type",), ("backbone", "type"))]
    return [None if node is None else node.value for node in found]


def _begins(key: Key, prefixes: Sequence[Key]) -> bool:
    return any(key[: len(prefix)] == prefix for prefix in prefixes)


def _placed(config: Config, file: File, key: str, message: str) -> tuple[int, str]:
    """A message about a key: on the line where this file sets it, else on its first line, naming the place."""
    node = lookup(config.root, as_key(key))
    if node is None:
        return 1, message
    lines = [origin.line for origin in node.origins if origin.layer.source == shorten(file.path) and origin.line]
    return (lines[-1], message) if lines else (1, f"{message} (set at {node.where})")


def _extends(file: File) -> int:
    """The line to blame for what comes from the bases."""
    return key_lines(file.text).get(("extends",), 1)


def _shown(value: Any) -> str:
    """` = value` where the value is short."""
    text = inline(value)
    return f" = {text}" if len(text) <= 60 else ""


RULES = {
    "recipe": _recipe,
    "alias": _alias,
    "building block": _block,
    "benchmark": _benchmark,
    "free name": _free_name,
}
