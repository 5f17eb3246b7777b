"""Runs docs/add-a-method.md in an empty folder."""

import re

import pytest

import small_run
from documents import follow, refusal

DOCUMENT = small_run.ROOT / "docs" / "add-a-method.md"
SHORT = " --set epochs=1 --set data.source.num_images=192 --set data.holdout.num_images=64"


def test_the_example_works_outside_the_tree(tmp_path):
    long = ("sslrun align_uniform.toml", "sslrun align_uniform.toml --dry-run")
    printed = follow(DOCUMENT, tmp_path, lambda line: line + SHORT if line.endswith(long) else line)
    assert 'type = "AlignUniform"' in printed, "config print"
    assert re.search(r"^done: .*work_dirs/align_uniform", printed, re.MULTILINE), "the run"
    assert re.search(r"^1 passed", printed, re.MULTILINE), "the reference"
    assert (tmp_path / "work_dirs/align_uniform/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("model.alignment=-1", "cannot be negative"),
        ("model.sharpnes=1", "unknown key of AlignUniform; did you mean sharpness"),
        ('model.uniformity="much"', "uniformity"),
    ],
)
def test_a_wrong_argument_is_one_line(tmp_path, setting, expected):
    assert expected in refusal(DOCUMENT, tmp_path, "align_uniform.toml", "--dry-run", "--set", setting)


@pytest.mark.nightly
def test_the_example_learns(tmp_path):
    accuracies = re.search(r"images: (\S+) % before training, (\S+) % after", follow(DOCUMENT, tmp_path))
    assert float(accuracies[2]) > float(accuracies[1]) + 10
