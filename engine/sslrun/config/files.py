"""Reads the files of an `extends` tree and puts them in merge order."""

import errno
import functools
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import tomli

from sslrun.config import recipes
from sslrun.config.lines import key_lines, nesting_line
from sslrun.config.merge import kind, nearest
from sslrun.config.node import Layer, Node, wrap
from sslrun.config.python_hints import hint_at
from sslrun.errors import RunFailed, UsageError
from sslrun.started import program

MAX_BYTES = 1 << 20
MAX_DEPTH = 64  # tables and lists in each other
IN_CODE = "<table>"  # the name of a recipe that is no file
MAX_CHAIN = 200  # files that inherit from each other, one after the other
_OUTAGES = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.EHOSTDOWN)


class File(NamedTuple):
    """One parsed file.

    Attributes:
        path: real path.
        chain: the files that led here by `extends`, the started one first, this one last.
        text: the whole text.
        table: its content, without `extends`.
        bases: real paths of the files that it extends, in order.
    """

    path: Path
    chain: tuple[Path, ...]
    text: str
    table: dict[str, Any]
    bases: list[Path]

    def node(self, order: int) -> Node:
        """The file as a layer with its place in the merge order."""
        shown = tuple(shorten(path) for path in self.chain)
        lines = functools.partial(key_lines, self.text)
        is_code = self.path.name == IN_CODE
        return wrap(self.table, Layer(order, shown[-1], str(self.path.parent), shown, lines), None if is_code else ())


def in_code(table: dict[str, Any]) -> File:
    """A recipe that a program gives as a table, as if it were a file in the current folder."""
    path = Path(os.path.realpath(IN_CODE))
    own = {key: value for key, value in table.items() if key != "extends"}
    return File(path, (path,), "", own, _bases(table.get("extends", []), "", (path,)))


def line_up(started: Path | File) -> list[File]:
    """A file and all files that it extends, depth first: bases before the file that names them, each once."""
    done: dict[Path, File] = {}

    def visit(path: Path, above: tuple[Path, ...]) -> None:
        if path in done:
            return
        if path in above:
            circle = (*above[above.index(path) :], path)
            raise UsageError(f"extends goes in a circle: {' -> '.join(map(shorten, circle))}")
        if len(above) == MAX_CHAIN:
            raise UsageError(f"{shorten(above[0])}: inherits over more than {MAX_CHAIN} files")
        file = started if isinstance(started, File) and not above else _read(path, (*above, path))
        for base in file.bases:
            visit(base, file.chain)
        done[path] = file

    visit(started.path if isinstance(started, File) else Path(os.path.realpath(recipes.located(started))), ())
    return list(done.values())


def recipe_name(started: Path, files: list[File]) -> str:
    """The name of a file's runs: its stem, or, for an alias, the name of its recipe.

    An alias is a file that contains nothing but `extends` to a single file. A table in code has the name of the one
    recipe that it extends, else "recipe".
    """
    by_path = {file.path: file for file in files}
    file, name = files[-1], started.stem
    if started.name == IN_CODE:
        if len(file.bases) != 1:
            return "recipe"
        file = by_path[file.bases[0]]
        name = file.path.stem
    while not file.table and len(file.bases) == 1:
        file = by_path[file.bases[0]]
        name = file.path.stem
    return name


def shorten(path: Path) -> str:
    """A path for messages: relative if it is below the current folder."""
    return os.path.relpath(path) if path.is_relative_to(os.getcwd()) else str(path)


def _read(path: Path, chain: tuple[Path, ...]) -> File:
    try:
        size = os.stat(path).st_size
        if not os.path.isfile(path) and not os.path.isdir(path):
            _fail(chain, None, "is not a regular file")  # a pipe would be waited for, and a device has no end
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        _raise_outage(path, error)
        _fail(chain, None, f"{error.strerror or error}{_siblings(path)}")
    if len(content) > MAX_BYTES:
        _fail(chain, None, f"{size:,} bytes; a recipe has at most {MAX_BYTES:,}")
    if content.startswith(b"\xef\xbb\xbf"):
        _fail(chain, 1, "begins with a byte-order mark; save the file as UTF-8 without one")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        _fail(chain, line, f"not UTF-8: byte 0x{content[error.start]:02x}")
    table = _parse(text, chain)
    bases = _bases(table.pop("extends", []), text, chain)
    return File(path, chain, text, table, bases)


def _parse(text: str, chain: tuple[Path, ...]) -> dict[str, Any]:
    too_deep = f"tables or lists nested more than {MAX_DEPTH} deep"
    try:
        table = tomli.loads(text)
    except RecursionError:
        _fail(chain, nesting_line(text, MAX_DEPTH), too_deep)
    except tomli.TOMLDecodeError as error:
        python = hint_at(text, error.pos)
        if chain[-1].suffix == ".py":
            python = f"`{program()} config import` converts configs of MMSelfSup"
        _fail(chain, error.lineno, f"{error.msg} (column {error.colno}){f'; {python}' if python else ''}")
    except ValueError as error:
        limit = sys.get_int_max_str_digits()
        number = re.search(rf"\d[\d_]{{{limit - 1},}}", text)
        if number is None:
            _fail(chain, None, str(error))
        _fail(chain, text.count("\n", 0, number.start()) + 1, f"a number of more than {limit:,} digits")
    level: list[tuple[str, Any]] = list(table.items())  # key of the top level, value
    for _ in range(MAX_DEPTH - 1):
        level = [(top, inside) for top, value in level for inside in _inside(value)]
    deep = next((top for top, value in level if isinstance(value, dict | list)), None)
    if deep is not None:
        _fail(chain, nesting_line(text, MAX_DEPTH) or key_lines(text).get((deep,)), too_deep)
    return table


def _inside(value: Any) -> list[Any]:
    """The values directly inside a table or a list."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _bases(extends: Any, text: str, chain: tuple[Path, ...]) -> list[Path]:
    """The real paths of the files that `extends` names."""

    def line() -> int | None:
        return key_lines(text).get(("extends",))

    named = extends if isinstance(extends, list) else [extends]
    bases = []
    for name in named:
        if not isinstance(name, str):
            _fail(chain, line(), f"extends: expected a path or a list of paths, got {kind(name)}")
        if "${" in name:
            _fail(chain, line(), f"extends: {name!r}: references are not resolved here")
        if "\0" in name:
            _fail(chain, line(), f"extends: {name!r} is not a path")
        try:
            own = recipes.located(name) if name.startswith(recipes.PREFIX) else Path(os.path.expanduser(name))
        except UsageError as error:
            _fail(chain, line(), f"extends: {error}")
        base = Path(os.path.realpath(chain[-1].parent / own))
        if not stat.S_ISREG(mode := _mode(base)):
            what = "is a folder, not a file" if stat.S_ISDIR(mode) else f"does not exist{_siblings(base)}"
            _fail((*chain, base), line(), f"extends: {shorten(base)} {what}", at=chain[-1])
        bases.append(base)
    return bases


def _mode(path: Path) -> int:
    """What is at a path, as of `os.stat`; 0 for nothing, or for a name that is too long."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        _raise_outage(path, error)
        return 0


def _raise_outage(path: Path, error: OSError) -> None:
    """Raises RunFailed if the storage is at fault and nothing is wrong with the recipe: a scheduler may try again."""
    if error.errno in _OUTAGES:
        raise RunFailed(f"{shorten(path)} cannot be read: {error.strerror}") from None


def _siblings(path: Path) -> str:
    """A hint about a file that does not exist: the nearest names in its folder, or a shipped recipe of its name."""
    folder = path.parent
    if os.path.exists(path):
        return ""
    beside = [p.name for p in folder.glob("*.toml")] if os.path.isdir(folder) else []
    return nearest(path.name, beside) or recipes.hint(path)


def _fail(chain: tuple[Path, ...], line: int | None, message: str, at: Path | None = None) -> NoReturn:
    place = shorten(at or chain[-1]) + (f":{line}" if line else "")
    via = f" (files: {' -> '.join(map(shorten, chain))})" if len(chain) > 1 else ""
    raise UsageError(f"{place}: {message}{via}")
