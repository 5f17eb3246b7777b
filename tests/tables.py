"""Tables of documents that tests observe: rows in benchmarks/results/, and Markdown between two marks of a page.

With TABLES=write in the environment, tests replace their rows and write the tables anew; else they compare.
"""

import fcntl
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import small_run

RESULTS = small_run.ROOT / "benchmarks/results"
DOCS = small_run.ROOT / "docs"

Row = dict[str, Any]


def is_writing() -> bool:
    return os.environ.get("TABLES") == "write"


def rows(name: str) -> list[Row]:
    """The committed rows of results/NAME.jsonl."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def replace(name: str, key: str, order: Sequence[str], new: Row) -> None:
    """Replace the row of results/NAME.jsonl that has the same value of `key`. Several processes may do so at a time.

    Args:
        name: name of the file.
        key: the row's key that names it.
        order: all values of `key`, in the order of the file; rows of others are dropped.
        new: the row.
    """
    path = RESULTS / f"{name}.jsonl"
    with open(path, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        kept = {row[key]: row for row in rows(name)} | {new[key]: new}
        file.truncate(0)
        file.write("".join(f"{json.dumps(kept[value])}\n" for value in order if value in kept))


def in_page(page: Path, name: str) -> list[str]:
    """The lines of the table NAME of a page."""
    text = page.read_text(encoding="utf-8")
    start, end = _place(text, name)
    return text[start:end].strip().splitlines()


def write(page: Path, name: str, lines: Sequence[str]) -> None:
    """Replace the table NAME of a page."""
    with open(page, "r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = file.read()
        start, end = _place(text, name)
        file.seek(0)
        file.truncate()
        file.write(text[:start] + "\n".join(["\n", *lines, "\n"]) + text[end:])


def check(page: str, name: str, lines: Callable[[], Sequence[str]]) -> None:
    """Assert that a page has the table that its rows give; while writing, write it."""
    if is_writing():
        write(DOCS / page, name, lines())
    assert in_page(DOCS / page, name) == list(lines())


def _place(text: str, name: str) -> tuple[int, int]:
    """Where a table begins and ends in the text of its page: between two comments, of which the first says who wrote
    it."""
    found = re.search(rf"<!-- table: {name}, by .* -->(.*?)<!-- end of table: {name} -->", text, re.DOTALL)
    assert found is not None, f"no table {name}"
    return found.span(1)
