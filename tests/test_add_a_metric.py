"""docs/add-a-metric.md, followed by a user in an empty folder."""

import json

import pytest

import small_run
from documents import follow, refusal

DOCUMENT = small_run.ROOT / "docs" / "add-a-metric.md"
FEW = " --set data.source.num_images=192 --set data.holdout.num_images=64"


def shorter(line: str) -> str:
    if line.endswith("sslrun metric.toml"):
        return line + FEW + " --set epochs=2"
    return line + FEW if line.endswith("sslrun csv.toml") else line


@pytest.mark.nightly
def test_the_examples_work_outside_the_tree(tmp_path):
    follow(DOCUMENT, tmp_path, shorter)
    run = tmp_path / "work_dirs/metric"
    measured = {row["step"]: row for row in small_run.metrics(run) if "nearest_mean/top1_pct" in row}
    assert list(measured) == [0, 6], "before the first step, and at the end"
    assert all(0 < row["nearest_mean/top1_pct"] <= 100 and "knn/top1_pct" in row for row in measured.values())
    assert "nearest_mean/top1_pct" in (run / "report.html").read_text()
    (kept,) = (run / "eval").glob("norm_*.json")
    results = json.loads(kept.read_text())["results"]
    assert 0 < results["norm/mean"] <= results["norm/largest"]
    assert (tmp_path / "encoder.npz").exists()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ('{"margin": 1.0}', "expected a name of the form group/name"),
        ('{"margin/x": torch.ones(())}', "returns a Tensor as 'margin/x', expected a Python number"),
        ('{"knn/top1_pct": 1.0}', "which another monitor has measured too"),
    ],
)
def test_what_a_row_cannot_hold_is_one_line(tmp_path, images, returned, message):
    recipe = small_run.write_recipe(tmp_path, images, steps=1)
    text = recipe.read_text() + '[[monitor.extra]]\ntype = "Wrong"\n'
    recipe.write_text('custom_imports = ["wrong_monitor"]\n' + text)
    (tmp_path / "wrong_monitor.py").write_text(
        "import torch\nfrom sslrun import Monitor\n\n"
        f"class Wrong(Monitor):\n    def measure(self, snapshot):\n        return {returned}\n"
    )
    code, printed = small_run.answer([str(recipe)], tmp_path)
    assert code == 2 and "Traceback" not in printed
    assert printed.splitlines()[-1].startswith("error: Wrong (monitor.extra.0) returns ") and message in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["metric.toml", "--set", "monitor.extra.0.every=1"], "unknown key of NearestMean"),
        (["metric.toml", "--set", "monitor.extra.0.interval=-1"], "interval must be at least 0, not -1"),
        (["csv.toml", "--set", "log.hooks=['tensorbord']"], "tensorbord"),
        (["csv.toml", "--set", "log.hooks=[{type='Csv',path='x'}]"], "unknown key of Csv"),
    ],
)
def test_a_wrong_argument_is_one_line(tmp_path, words, message):
    assert message in refusal(DOCUMENT, tmp_path, *words, "--dry-run")
