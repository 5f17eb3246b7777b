"""docs/add-a-method.md, followed by a user in an empty folder: its files are written, its commands are run."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import small_run

DOCUMENT = small_run.ROOT / "docs" / "add-a-method.md"
SHORT = " --set epochs=1 --set data.source.num_images=192 --set data.holdout.num_images=64"


def blocks(language: str) -> list[tuple[str, str]]:
    """(what follows the language, text) of every block of code in the document."""
    found = re.findall(rf"^```{language} ?(.*?)\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return [(name, text.replace("SSLRUN", str(small_run.ROOT))) for name, text in found]


def follow(folder: Path, suffix: str) -> str:
    """What the commands print, in order; a run is shortened by `suffix`."""
    for name, text in blocks("python") + blocks("toml"):
        (folder / name).write_text(text)
    printed = []
    for _, commands in blocks("console"):
        for command in commands.splitlines():
            words = shlex.split(command)
            variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
            command += suffix if words[0].endswith("sslrun") and words[1].endswith(".toml") else ""
            environment = {**small_run.environment(), **variables}
            done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            printed.append(done.stdout)
    return "\n".join(printed)


def test_the_example_works_outside_the_tree(tmp_path):
    printed = follow(tmp_path, SHORT)
    assert 'type = "VICReg"' in printed, "config print"
    assert re.search(r"^done: .*work_dirs/vicreg", printed, re.MULTILINE), "the run"
    assert re.search(r"^1 passed", printed, re.MULTILINE), "the reference"
    assert (tmp_path / "work_dirs/vicreg/metrics.jsonl").exists()


def test_a_wrong_argument_is_one_line(tmp_path):
    for name, text in blocks("python") + blocks("toml"):
        (tmp_path / name).write_text(text)
    command = [small_run.ROOT / "bin/sslrun", "vicreg.toml", "--dry-run", "--set"]
    for setting, expected in (
        ("model.variance=-1", "cannot be negative"),
        ("model.varianze=1", "unknown key of VICReg; did you mean variance"),
        ('model.covariance="much"', "covariance"),
    ):
        done = subprocess.run([*command, setting], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert expected in done.stderr


@pytest.mark.nightly
def test_the_example_learns(tmp_path):
    before, after = re.search(r"pictures: (\S+) % before training, (\S+) % after", follow(tmp_path, "")).groups()
    assert float(after) > float(before) + 10
