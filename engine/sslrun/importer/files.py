"""Reads old config files as text and parses them; every error is one line with the name of the file."""

import ast
import os
import re
import warnings
from pathlib import Path

from sslrun.config.files import shorten
from sslrun.config.merge import nearest
from sslrun.errors import UsageError

MAX_BYTES = 1 << 18

_OWN_NAME = re.compile(r"\{\{\s*(fileDirname|fileBasenameNoExtension|fileBasename|fileExtname)\s*\}\}")
_ENVIRONMENT = re.compile(r"\{\{['\"]?\s*\$(\w+)\s*:\s*([^\s'\"}]*)\s*['\"]?\}\}")


def text_of(path: Path) -> str:
    """The text of a config file. Raises UsageError where there is none."""
    if not os.path.isfile(path):
        raise UsageError(missing(path))
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UsageError(f"{shorten(path)}: {size:,} bytes; at most {MAX_BYTES:,} are read")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{shorten(path)}: not UTF-8: byte 0x{error.object[error.start]:02x}") from None
    except OSError as error:
        raise UsageError(f"{shorten(path)}: {error.strerror}") from None


def missing(path: Path) -> str:
    """Why a path does not name a file."""
    if os.path.isdir(path):
        return f"{shorten(path)} is a folder, not a file"
    if os.path.exists(path):
        return f"{shorten(path)} is not a regular file"
    beside = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    return f"{shorten(path)} does not exist{nearest(path.name, [name for name in beside if name.endswith('.py')])}"


def filled_in(text: str, path: Path) -> tuple[str, list[tuple[int, str, str]]]:
    """The text with `{{fileBasename}}` and the like replaced, and `{{$NAME:default}}` by its default.

    Also returns (line, template, message) of each environment variable: the environment is not read.
    """
    parts = {
        "fileDirname": str(path.parent),
        "fileBasename": path.name,
        "fileBasenameNoExtension": path.stem,
        "fileExtname": path.suffix,
    }
    if _OWN_NAME.search(text):
        if re.search(r"['\"\\\n\r{}]", str(path)):
            raise UsageError(f"{shorten(path)}: a path with quotes or backslashes cannot be filled into a template")
        text = _OWN_NAME.sub(lambda match: parts[match[1]], text)
    notes = []
    for match in _ENVIRONMENT.finditer(text):
        reason = f"the environment is not read: {match[2]!r} stands for it; ${{env:{match[1]},...}} would read it"
        notes.append((text.count("\n", 0, match.start()) + 1, match[0], reason))
    return _ENVIRONMENT.sub(lambda match: match[2], text), notes


def parsed(text: str, source: str) -> list[ast.stmt]:
    """Parses a file into statements; `source` is its name for errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a pattern such as "\d" is a warning, on a line of its own
            return ast.parse(text).body
    except SyntaxError as error:
        place = f"{source}:{error.lineno}" if error.lineno else source
        raise UsageError(f"{place}: not Python: {' '.join((error.msg or '').split())}") from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise UsageError(f"{source}: not Python that can be read: {error or 'nested too deep'}") from None
