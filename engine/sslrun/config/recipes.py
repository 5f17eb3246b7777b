"""The recipes that ship with sslrun: `sslrun:NAME` names one of them, wherever sslrun is installed."""

import os
from collections.abc import Iterator
from pathlib import Path

from sslrun.config.merge import nearest
from sslrun.errors import UsageError
from sslrun.started import program

FOLDER = Path(__file__).parents[1] / "configs"  # in a checkout, a link to the folder configs
PREFIX = "sslrun:"
_BLOCKS = "_base_"  # parts of recipes: `extends` may name them


def located(path: str | Path) -> Path:
    """The file that a user means: `sslrun:NAME` is a shipped recipe, and so is NAME alone if there is no such file.

    Raises UsageError if no shipped recipe has the name after `sslrun:`.
    """
    text = str(path)
    if text.startswith(PREFIX):
        name = text.removeprefix(PREFIX)
        if (file := _file(name)) is None:
            near = nearest(name, list(names())) or f"; `{program()} list recipes` names them"
            raise UsageError(f"{text}: no recipe of this name ships with sslrun{near}")
        return file
    if not text.endswith(".toml") and not os.path.isfile(text) and (file := _file(text)):
        return file
    return Path(path)


def names() -> Iterator[str]:
    """The names of all shipped recipes and benchmarks: those at the top of `configs` first, then folder by folder."""
    files = (Path(name) for name in _files(FOLDER))
    yield from (str(file.with_suffix("")) for file in sorted(files, key=lambda file: (len(file.parts), file)))


def description(name: str) -> str:
    """The first comment of a recipe that is no command."""
    with open(FOLDER / f"{name}.toml", encoding="utf-8") as lines:
        comments = (line.strip("# \n") for line in lines if line.startswith("# "))
        return next((text for text in comments if not text.startswith("bin/sslrun")), "")


def hint(path: str | Path) -> str:
    """For a file that does not exist, perhaps a path of another checkout: the shipped recipe that may be meant."""
    name = str(path).removesuffix(".toml").rpartition("configs/")[2]
    for candidate in (name, os.path.basename(name)):
        if _file(candidate) is not None:
            return f"; {PREFIX}{candidate} ships with sslrun"
    is_word = "." not in os.path.basename(path) and os.path.abspath(path) == os.path.abspath(os.path.basename(path))
    return nearest(os.path.basename(path), list(names())) if is_word else ""


def _file(name: str) -> Path | None:
    """The file of a shipped recipe."""
    file = FOLDER / f"{name.removesuffix('.toml')}.toml"
    is_inside = ".." not in file.parts and not os.path.isabs(name) and "\0" not in name and len(name) < 200
    return file if is_inside and file.is_file() else None


def _files(folder: Path, below: str = "") -> Iterator[str]:
    for entry in os.scandir(folder / below):
        inside = os.path.join(below, entry.name)
        if entry.is_dir() and entry.name != _BLOCKS:
            yield from _files(folder, inside)
        elif entry.name.endswith(".toml"):
            yield inside
