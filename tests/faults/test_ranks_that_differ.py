"""Ranks that were started with different recipes, images or code: one line that names what differs, exit code 2."""

import contextlib
import io
import os
import shutil
from pathlib import Path

import pytest

import small_run
from ranks import run_ranks
from sslrun import cli
from sslrun.runtime import agreement


def started(words: list[str], folder: str) -> tuple[int, str]:
    """Starts a training as one of several ranks, each with its own WHICH and in its own folder, if there is one."""
    rank = os.environ["RANK"]
    os.environ["WHICH"] = rank
    if Path(folder, rank).is_dir():
        os.chdir(Path(folder, rank))
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(words)
    return code, err.getvalue()


def errors(recipe: Path, *settings: str, folder: str = "") -> list[tuple[int, str]]:
    words = [str(recipe), *(word for setting in settings for word in ("--set", setting))]
    return run_ranks(started, 2, words, folder, timeout_s=300)


@pytest.fixture
def recipe(tmp_path, images) -> Path:
    return small_run.write_recipe(tmp_path, images, steps=2)


def refused(results: list[tuple[int, str]], expected: str) -> None:
    assert [code for code, _ in results] == [2, 2], results
    lines = results[0][1].strip().splitlines()
    assert len(lines) == 1 and expected in lines[0] and "rank 1 on " in lines[0], lines


def test_recipes(recipe):
    results = errors(recipe, "seed=${env:WHICH}")
    refused(results, "has another recipe than rank 0: seed: 0 -> 1; all ranks")
    assert not list(recipe.parent.glob("work_dirs/*/metrics.jsonl"))


def test_the_same_images_may_lie_elsewhere_on_each_machine(recipe, images, tmp_path):
    for rank in range(2):
        shutil.copytree(images, tmp_path / f"images{rank}")
    results = errors(recipe, f"data.source.data_prefix={tmp_path}/images${{env:WHICH}}")
    assert [code for code, _ in results] == [0, 0], results


def test_images(recipe, images, tmp_path):
    for rank in range(2):
        shutil.copytree(images, tmp_path / f"images{rank}")
    image = next((tmp_path / "images1").rglob("*.jpg"))
    image.write_bytes(image.read_bytes() + b"\0")
    results = errors(recipe, f"data.source.data_prefix={tmp_path}/images${{env:WHICH}}")
    refused(results, "has another set of images than rank 0: digest of the names and sizes")


def test_code_of_the_user(recipe, tmp_path):
    for rank in range(2):
        module = tmp_path / str(rank) / "mine.py"
        module.parent.mkdir()
        module.write_text(f"number = {rank}\n")
    results = errors(recipe, 'custom_imports=["mine"]', folder=str(tmp_path))
    refused(results, "has another installation than rank 0: source files of.mine: ")


def test_the_digest_of_the_package_is_that_of_its_files(tmp_path, monkeypatch):
    package = tmp_path / "mine" / "below"
    package.mkdir(parents=True)
    (tmp_path / "mine/__init__.py").touch()
    (package / "part.py").write_text("a = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = agreement.code(["mine"])
    assert before == agreement.code(["mine"])
    assert set(before["source files of"]) == {"sslrun", "sslkernels", "mine"}
    assert len(set(before["source files of"].values())) == 3
    (package / "part.py").write_text("a = 2\n")
    changed = agreement.code(["mine"])
    assert before["source files of"].pop("mine") != changed["source files of"].pop("mine")
    assert before == changed and before["version of"]["torch"]
