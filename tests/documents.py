"""Runs documents: writes their files, runs their commands and compares the output.

    ```toml mine.toml        a file, written into the reader's folder
    ```console exit=2        `$ ` begins a command, followed by its output; `...` matches anything
    ```toml                  an excerpt, neither written nor run

`SSLRUN` in a document stands for the path of the checkout.
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
    """A fenced block: its language, the rest of its first line, its text and its line number."""

    language: str
    info: str
    text: str
    line: int


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    matches = re.finditer(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [
        Block(m[1], m[2], m[3].replace("SSLRUN", str(small_run.ROOT)), text.count("\n", 0, m.start()) + 1)
        for m in matches
    ]


def write_files(document: Path, folder: Path) -> None:
    """Write each named file of the document into `folder`, in its first version."""
    for block in reversed(blocks(document)):
        if block.language != "console" and block.info:
            _write(block, folder)


def refusal(document: Path, folder: Path, *words: str) -> str:
    """The only line that a command prints, which must be an error, in a folder with the files of a document."""
    write_files(document, folder)
    code, printed = small_run.answer(words, folder)
    assert code == 2 and len(printed.splitlines()) == 1, printed
    return printed


def follow(document: Path, folder: Path, edited: Callable[[str], str] = str) -> str:
    """Write the files and run the commands of a document in its order; return everything that the commands printed.

    Args:
        document: path of a Markdown file.
        folder: the reader's folder, empty.
        edited: applied to every command before it runs, for example to shorten a training.
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
    """(command, expected output); "" if the document shows no output."""
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
    """Whether the output matches; an empty expectation matches anything."""
    if not expected.strip():
        return True
    pattern = re.escape(expected.strip()).replace(re.escape("..."), ".*")
    return re.fullmatch(pattern, output.strip(), re.DOTALL) is not None
