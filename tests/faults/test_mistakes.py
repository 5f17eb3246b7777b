"""Every mistake in the table of docs/reliability.md gives the exit code and the line that are written there.

`make fault-tables` writes them anew.
"""

import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from mistakes import MISTAKES

import small_run
import tables

ROWS, KEY, PAGE = "mistakes", "mistake", "reliability.md"


@pytest.fixture
def here(tmp_path, trained, images, monkeypatch):
    """A folder with a recipe, its images, and a finished run."""
    shutil.copytree(images, tmp_path / "images")
    run = Path(shutil.copytree(trained, tmp_path / "runs/done"))
    recipe = trained.parents[1] / f"{trained.name}.toml"
    for source, copies in ((recipe, ("mine.toml", "done.toml")), (run / "config.toml", ("runs/done/config.toml",))):
        text = source.read_text().replace(str(images), "images").replace(str(trained.parent), "runs")
        for copy in copies:
            (tmp_path / copy).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "mistake",
    [pytest.param(each, id=each.name, marks=[pytest.mark.nightly] if each.nightly else []) for each in MISTAKES],
)
def test_a_mistake_gives_the_line_of_the_page(mistake, here, capsys):
    if "=cuda" in mistake.words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    mistake.prepare(here)
    if mistake.made is not None:
        code, printed = mistake.made(here)
    else:
        code, out, errors = small_run.call(capsys, *mistake.words.split())
        printed = errors or out
    assert "Traceback" not in printed
    row = {KEY: mistake.name, "code": code, "line": _line(printed, here)}
    if tables.is_writing():
        tables.replace(ROWS, KEY, [each.name for each in MISTAKES], row)
    assert row in tables.rows(ROWS)


def test_the_table_is_that_of_the_rows():
    assert [row[KEY] for row in tables.rows(ROWS)] == [mistake.name for mistake in MISTAKES]
    tables.check(PAGE, "mistakes", lines)


def lines() -> list[str]:
    table = ["| mistake | code | line |", "|---|---|---|"]
    for row in tables.rows(ROWS):
        quoted = f"`` {row['line']} ``" if "`" in row["line"] else f"`{row['line']}`"
        table.append(f"| {row[KEY]} | {row['code']} | {quoted} |")
    return table


def _line(printed: str, here: Path) -> str:
    """The error, else the last warning, else the last line; with names in place of what differs between machines."""
    told = printed.rstrip().splitlines()
    for prefix in ("error: ", "warning: "):
        told = [line for line in told if line.startswith(prefix)] or told
    line = told[-1].replace(str(here), "/home/me").replace(socket.gethostname(), "host1")
    return re.sub(r"spread [\d.]+", "spread 0.08", re.sub(r"process \d+", "process 4711", line))
