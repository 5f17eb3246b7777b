"""Documents as programs: their files are written, their commands are run, what they print is compared.

    ```toml mine.toml        a file, written into the reader's folder
    ```console exit=2        `$ ` begins a command; what follows is what it prints, `...` standing for anything
    ```toml                  an excerpt, only read

`SSLRUN` in a document is the checkout.
"""

import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import small_run


@dataclass(frozen=True)
class Block:
    """A fenced piece of a document: its language, what follows it on the first line, its text and its line number."""

    language: str
    info: str
    text: str
    line: int


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [
        Block(m[1], m[2], m[3].replace("SSLRUN", str(small_run.ROOT)), text.count("\n", 0, m.start()) + 1)
        for m in found
    ]


def write_files(document: Path, folder: Path) -> None:
    """Every named file of the document, the first version of each."""
    for block in reversed(blocks(document)):
        if block.language != "console" and block.info:
            _write(block, folder)


def follow(document: Path, folder: Path, edited: Callable[[str], str] = str) -> str:
    """Everything that the document says, in its order; what the commands printed, all of it.

    Args:
        document: Markdown.
        folder: the reader's, empty.
        edited: of every command, to make a run shorter.
    """
    printed = ""
    for block in blocks(document):
        if block.language == "console":
            wanted_code = int(block.info.removeprefix("exit=") or 0)
            for command, expected in _commands(block.text):
                code, output = _run(edited(command), folder)
                place = f"{document.name}:{block.line}: {command}"
                assert code == wanted_code, f"{place}\nexit code {code}\n{output}"
                assert _matches(output, expected), f"{place}\nprinted\n{output}\nnot\n{expected}"
                printed += output
        elif block.info:
            _write(block, folder)
    return printed


def _write(block: Block, folder: Path) -> None:
    path = folder / block.info
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text, encoding="utf-8")


def _commands(text: str) -> list[tuple[str, str]]:
    """(command, what it prints); "" for what nothing is said of."""
    pieces = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    assert pieces, f"no command in\n{text}"
    return [(command, expected) for command, _, expected in (piece.partition("\n") for piece in pieces)]


def _run(command: str, folder: Path) -> tuple[int, str]:
    settings = {}
    while re.match(r"[A-Z_]+=", command):
        setting, command = command.split(" ", 1)
        name, value = setting.split("=", 1)
        settings[name] = value
    program, *words = shlex.split(command)
    if program == str(small_run.ROOT / "bin/sslrun"):
        return small_run.answer(words, folder, settings)
    options = {"cwd": folder, "env": small_run.environment() | settings}
    done = subprocess.run([program, *words], **options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def _matches(output: str, expected: str) -> bool:
    """Line ends and the checkout's place do not count; nothing expected matches anything."""
    if not expected.strip():
        return True
    pattern = re.escape(expected.strip()).replace(re.escape("..."), ".*")
    return re.fullmatch(pattern, output.strip(), re.DOTALL) is not None
