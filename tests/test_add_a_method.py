"""Runs docs/add-a-method.md in an empty folder."""

import re

import pytest

import small_run
from documents import follow, refusal

DOCUMENT = small_run.ROOT / "docs" / "add-a-method.md"
SHORT = " --set epochs=1 --set data.source.num_images=192 --set data.holdout.num_images=64"


def test_the_example_works_outside_the_tree(tmp_path):
    long = ("sslrun vicreg.toml", "sslrun vicreg.toml --dry-run")
    printed = follow(DOCUMENT, tmp_path, lambda line: line + SHORT if line.endswith(long) else line)
    assert 'type = "VICReg"' in printed, "config print"
    assert re.search(r"^done: .*work_dirs/vicreg", printed, re.MULTILINE), "the run"
    assert re.search(r"^1 passed", printed, re.MULTILINE), "the reference"
    assert (tmp_path / "work_dirs/vicreg/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("model.variance=-1", "cannot be negative"),
        ("model.varianze=1", "unknown key of VICReg; did you mean variance"),
        ('model.covariance="much"', "covariance"),
    ],
)
def test_a_wrong_argument_is_one_line(tmp_path, setting, expected):
    assert expected in refusal(DOCUMENT, tmp_path, "vicreg.toml", "--dry-run", "--set", setting)


@pytest.mark.nightly
def test_the_example_learns(tmp_path):
    accuracies = re.search(r"images: (\S+) % before training, (\S+) % after", follow(DOCUMENT, tmp_path))
    assert float(accuracies[2]) > float(accuracies[1]) + 10
