"""What TAB can complete in a command line: verbs, options, recipes, keys, runs, names. Imports no torch."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sslrun.commands.command_line import Place, options, place_after, verbs_of
from sslrun.config import load, recipes
from sslrun.config.node import Node, as_key
from sslrun.config.schema_reader import at, classes, committed_schema, follow, kinds, named, parts
from sslrun.errors import RunFailed, UsageError
from sslrun.glossary import METRICS

MOST = 2000  # entries of a folder that are looked at
_RUN_MARKS = ("state.json", "metrics.jsonl", "config.toml")


def candidates(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The words that may stand in place of the last of `words`, which is begun or empty.

    A candidate that ends with "/", "." or "=" goes on; after another one a new word begins.

    Args:
        parser: of the whole command line.
        words: the command line without the program, as the shell has split it.
    """
    *before, word = words or [""]
    place = place_after(parser, before)
    begun, is_value, value = word.partition("=")
    if place.option is None and is_value and begun in place.parser._option_string_actions:
        return [f"{begun}={each}" for each in _values(place, place.parser._option_string_actions[begun], value)]
    if place.option is not None:
        found = list(_values(place, place.option, word))
    elif word.startswith("-"):
        found = options(place.parser)
        if place.parser is parser:
            found += options(verbs_of(parser)["train"])
    else:
        found = list(_positional(place, word))
        if place.parser is parser:
            found += [*_recipes(word)]
    return [each for each in dict.fromkeys(found) if each.startswith(word)]


def _positional(place: Place, word: str) -> Iterator[str]:
    known = verbs_of(place.parser)
    if known:
        yield from known
        return
    actions = [action for action in place.parser._actions if not action.option_strings]
    if actions:
        last = actions[-1] if actions[-1].nargs in ("+", "*") else None
        at_place = actions[len(place.values) : len(place.values) + 1] or ([last] if last else [])
        for action in at_place:
            yield from _values(place, action, word)


def _values(place: Place, action: argparse.Action, word: str) -> Iterator[str]:
    """The values of an option or a positional argument, by what help calls them."""
    found: Iterator[str]
    if action.choices or action.dest == "devices":
        found = map(str, action.choices or ("auto",))
    else:
        name = str(action.metavar)
        of_verb = _VALUES.get((place.parser.prog.rpartition(" ")[2], name))
        find = of_verb or _VALUES.get(("", name)) or (lambda place, word: _paths(word))
        found = find(place, word)
    return (each for each in found if each.startswith(word))


def _recipes(word: str) -> Iterator[str]:
    prefix = recipes.PREFIX if word.startswith(recipes.PREFIX) else ""
    yield from (prefix + name for name in recipes.names())
    yield from _paths(word, ".toml")


def _paths(word: str, suffix: str = "", is_run: bool = False) -> Iterator[str]:
    """The folders, and the files with a suffix, that a begun path may become."""
    folder, name = os.path.split(word)
    with contextlib.suppress(OSError), os.scandir(os.path.expanduser(folder) or ".") as entries:
        for entry, _ in zip(entries, range(MOST), strict=False):
            if entry.name.startswith(name) and (name.startswith(".") or not entry.name.startswith(".")):
                path = os.path.join(folder, entry.name)
                if not entry.is_dir():
                    yield from [path] if entry.name.endswith(suffix) else []
                elif is_run and any(os.path.exists(os.path.join(entry.path, mark)) for mark in _RUN_MARKS):
                    yield path
                else:
                    yield path + "/"


def _runs(word: str) -> Iterator[str]:
    """Run folders, those of the usual place first; folders that may hold some; files of weights."""
    if not word or "work_dirs/".startswith(word):
        yield from _paths("work_dirs/", is_run=True)
    yield from _paths(word, is_run=True)


def _root(place: Place) -> Node:
    """The recipe that the command line names, or that of the run; an empty one if it cannot be read."""
    for word in reversed(place.values):
        for file in (os.path.join(word, "config.toml"), word):
            if os.path.isfile(recipes.located(file)):
                with contextlib.suppress(UsageError, RunFailed, OSError, ValueError):
                    return load(file).root
    return Node({}, ())


def _keys(place: Place, word: str) -> Iterator[str]:
    """The keys of one level of the recipe, and the values of a key that has few."""
    schema = committed_schema()
    key, is_set, _ = word.partition("=")
    with contextlib.suppress(UsageError, RunFailed, OSError):
        if is_set:
            yield from (f"{key}={value}" for value in _known_values(at(schema, _root(place), as_key(key)).schema))
            return
        above = key.rpartition(".")[0]
        setting = at(schema, _root(place), as_key(above))
        for name, part in parts(schema["$defs"], setting).items():
            node = part.node or Node({}, ())
            table = named(schema["$defs"], part.schema, node)
            items = node.value if isinstance(node.value, list) else []
            has_tables = any(isinstance(item.value, dict | list) for item in items)
            is_table = isinstance(node.value, dict) and (part.node is not None or "properties" in table)
            yield f"{above}.{name}".lstrip(".") + ("." if is_table or has_tables else "=")


def _known_values(schema: dict[str, Any]) -> Iterator[str]:
    for option in schema.get("anyOf", [schema]):
        if option.get("type") == "boolean":
            yield from ("true", "false")
        yield from (str(value) for value in option.get("enum", ()))


def _settings(place: Place, word: str) -> Iterator[str]:
    """Keys to explain: as for `--set`, without its "="."""
    yield from (each.rstrip("=") for each in _keys(place, word))


def _listed(place: Place, word: str) -> Iterator[str]:
    known = kinds(committed_schema())
    kind = place.values[0] if place.values else None
    if kind is None:
        yield from ("recipes", *known, *(name for union in known.values() for name in classes(union)))
    else:
        yield from recipes.names() if kind == "recipes" else classes(known.get(kind, {"oneOf": []}))


def _evaluations(place: Place, word: str) -> Iterator[str]:
    schema = committed_schema()
    names = [follow(schema["$defs"], option)["title"] for option in kinds(schema)["evaluations"]["oneOf"]]
    yield from map(str.lower, names)


def _formats(place: Place, word: str) -> Iterator[str]:
    yield from map(str.lower, classes(kinds(committed_schema())["formats"]))


Find = Callable[[Place, str], Iterator[str]]
_RECIPE: Find = lambda place, word: _recipes(word)  # noqa: E731
_RUN: Find = lambda place, word: _runs(word)  # noqa: E731
_VALUES: dict[tuple[str, str], Find] = {  # (verb or "", what help calls the value): its candidates
    ("", "CONFIG"): _RECIPE,
    ("", "RECIPE"): _RECIPE,
    ("", "A"): _RECIPE,
    ("", "B"): _RECIPE,
    ("", "TOML"): _RECIPE,
    ("", "FILES"): lambda place, word: _paths(word, ".toml"),
    ("", "RUN"): _RUN,
    ("runs", "DIR"): _RUN,
    ("", "KEY=VALUE"): _keys,
    ("", "KEY"): _settings,
    ("list", "KIND"): _listed,
    ("list", "NAME"): _listed,
    ("eval", "KIND"): _evaluations,
    ("", "FORMAT"): _formats,
    ("", "METRIC"): lambda place, word: iter(METRICS),
    ("", "N"): lambda place, word: iter(()),
    ("", "NAME"): lambda place, word: iter(()),
}
