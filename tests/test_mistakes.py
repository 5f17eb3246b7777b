"""Every mistake in the table of docs/reliability.md gives the exit code and the line that are written there.

MISTAKES=write pytest -m "nightly or not nightly" tests/test_mistakes.py      writes the table anew
"""

import os
import re
import shutil
import socket
from pathlib import Path

import pytest

import small_run
from mistakes import MISTAKES, Mistake

DOCUMENT = small_run.ROOT / "docs/reliability.md"
START, END = "<!-- table: mistakes, by tests/test_mistakes.py -->", "<!-- end of table: mistakes -->"


@pytest.fixture
def here(tmp_path, trained, images, monkeypatch):
    """A folder with a recipe, its images, and a finished run."""
    shutil.copytree(images, tmp_path / "images")
    run = Path(shutil.copytree(trained, tmp_path / "runs/done"))
    text = (trained.parents[1] / f"{trained.name}.toml").read_text()
    text = text.replace(str(images), "images").replace(str(trained.parent), "runs")
    for name in ("mine.toml", "done.toml"):
        (tmp_path / name).write_text(text)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace(str(images), "images").replace(str(trained.parent), "runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def row(mistake: Mistake, code: int, line: str) -> str:
    quoted = f"`` {line} ``" if "`" in line else f"`{line}`"
    return f"| {mistake.name} | {code} | {quoted} |"


def written() -> dict[str, str]:
    """The rows of the table by mistake."""
    text = DOCUMENT.read_text()
    lines = text[text.index(START) : text.index(END)].splitlines()
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if "`" in line}


@pytest.mark.parametrize(
    "mistake",
    [pytest.param(each, id=each.name, marks=[pytest.mark.nightly] if each.nightly else []) for each in MISTAKES],
)
def test_a_mistake_gives_the_line_of_the_page(mistake, here, capsys):
    mistake.prepare(here)
    if mistake.made is not None:
        code, printed = mistake.made(here)
    else:
        code, out, errors = small_run.call(capsys, *mistake.words.split())
        printed = errors or out
    assert "Traceback" not in printed
    line = printed.rstrip().splitlines()[-1].replace(str(here), "/home/me").replace(socket.gethostname(), "host1")
    line = re.sub(r"process \d+", "process 4711", line)
    if os.environ.get("MISTAKES") == "write":
        _write(mistake, row(mistake, code, line))
    assert written().get(mistake.name) == row(mistake, code, line)


def test_the_table_has_these_mistakes_and_no_others():
    assert list(written()) == [mistake.name for mistake in MISTAKES]


def _write(mistake: Mistake, new: str) -> None:
    rows = written() | {mistake.name: new}
    text = DOCUMENT.read_text()
    lines = ["| mistake | exit code | the line |", "|---|---|---|"]
    lines += [rows[each.name] for each in MISTAKES if each.name in rows]
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    DOCUMENT.write_text("\n\n".join([before, "\n".join(lines), after]))
