"""docs/metrics.md has every metric that is written, and no other."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import small_run
from sslrun.cli import main
from sslrun.glossary import METRICS, better, meaning, page

ENGINE = small_run.ROOT / "engine/sslrun"
GROUPS = {name.partition("/")[0] for name in METRICS if "/" in name}


def numbers(table: dict) -> set[str]:
    return {name for name, value in table.items() if isinstance(value, int | float)}


def literals(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def of_a_loss(method: Path) -> set[str]:
    """The metrics that a method's file gives to `Loss`: keys of a table there, or of one called metrics."""
    tables, added = [], set()
    for node in ast.walk(ast.parse(method.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Loss":
            tables += node.args[1:2]
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "metrics":
            tables.append(node.value)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            place = node.targets[0]
            if ast.unparse(place.value) == "metrics" and isinstance(place.slice, ast.Constant):
                added.add(place.slice.value)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "metrics" and node.value:
            tables.append(node.value)
    return {key.value for table in tables if isinstance(table, ast.Dict) for key in table.keys} | added


def in_the_code() -> set[str]:
    """Every name that the code can write."""
    files = [*(ENGINE / "methods").glob("*.py"), *(ENGINE / "nn").glob("*distillation.py")]
    names = {f"train/{key}" for file in files for key in of_a_loss(file)}
    for file in ENGINE.rglob("*.py"):
        if file.name not in ("glossary.py", "curves.py") and file.parent.name not in ("doctor", "sources", "importer"):
            names |= {
                text for text in literals(ast.parse(file.read_text())) if re.fullmatch(r"[a-z]+/[a-z0-9_]+", text)
            }
    steps = ast.parse((ENGINE / "training.py").read_text())
    assert "grad_norm" in {*literals(steps)} and "loss" in of_a_step()
    return {name for name in names if name.partition("/")[0] in GROUPS} | {"train/grad_norm"}


def of_a_step() -> set[str]:
    return {*literals(ast.parse((ENGINE / "runtime/metrics.py").read_text()))}


def test_the_page_is_current():
    assert (small_run.ROOT / "docs/metrics.md").read_text() == page(), "run python -m sslrun.glossary"


def test_the_code_writes_what_is_listed():
    composed = {"val/loss", "finetune/top1_pct", "finetune/top5_pct", "step", "epoch", "wall_s", "k", "num_samples"}
    assert in_the_code() - METRICS.keys() - {"data/shapes"} == set()
    assert METRICS.keys() - in_the_code() - composed == set()


@pytest.mark.parametrize(
    ("method", "names"),
    [("moco", {"top1_pct", "feature_std"}), ("odc", {"top1_pct", "largest_cluster"}), ("simclr", {"feature_std"})],
)
def test_what_is_read_from_the_code_of_a_method(method, names):
    assert names <= of_a_loss(ENGINE / f"methods/{method}.py")


def test_a_run_and_its_evaluations_write_what_is_listed(run):
    written = set().union(*map(numbers, small_run.metrics(run)))
    assert len(written) > 12 and written - METRICS.keys() == set()
    for words in (["knn"], ["spectrum"], ["linear", "--set", "eval.linear.epochs=1"]):
        assert main(["eval", words[0], str(run), *words[1:]]) == 0
    results = [json.loads(file.read_text())["results"] for file in (run / "eval").glob("*.json")]
    written = set().union(*map(numbers, results))
    assert {"k", "knn/top1_pct", "linear/top1_pct", "spectrum/rankme"} <= written <= METRICS.keys()


def test_which_way_is_good():
    higher = ["knn/top1_pct", "train/feature_std", "val/feature_std", "mine/purity", "speed/images_per_s", "step"]
    lower = ["train/loss", "val/loss", "spectrum/alignment", "mine/loss", "mine/error_pct", "mine/latency_ms"]
    assert {*map(better, higher)} == {"higher"} and {*map(better, lower)} == {"lower"}


def test_the_meaning_of_a_name():
    assert meaning("epoch") == "step in epochs; a fraction within an epoch."
    assert meaning("val/feature_std") == meaning("train/feature_std") and meaning("val/loss") != meaning("train/loss")
    assert meaning("mine/purity") is None


def test_each_has_a_meaning_with_a_source_where_it_is_a_formula():
    for metric in METRICS.values():
        assert metric.meaning.endswith((".", ")", "*")) and metric.better in ("higher", "lower", None), metric
        assert not metric.name.endswith("_pct") or metric.unit == "%", metric
