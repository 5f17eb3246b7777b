"""Paths of a recipe start from the folder in which sslrun is started, `~` is the home folder, and runs record them."""

import os
import shutil
from pathlib import Path

import pytest
import tomli
import tomli_w

import small_run
from sslrun.config import dump
from sslrun.config.annotations import describe
from sslrun.config.build import build
from sslrun.config.component import Component
from sslrun.config.node import Layer, wrap
from sslrun.config.paths import FilePath, absolute, with_absolute_paths
from sslrun.errors import UsageError
from sslrun.runtime.run_folder import RunFolder
from test_run_folder import RECIPE, used_folder


class Holder(Component, kind="holders"):
    """Base of the class below."""


class Paths(Holder):
    """Every way to declare a path.

    Args:
        one: a path.
        some: a list.
        named: by name.
        maybe: a path or a number.
        text: no path.
        default: a path with a default.
        object: as pathlib has it.
    """

    def __init__(
        self,
        one: FilePath,
        some: list[FilePath] | None = None,
        named: dict[str, FilePath] | None = None,
        maybe: FilePath | int = 3,
        text: str = "a/b",
        default: FilePath = "data/x",
        object: Path = Path("p/q"),
    ) -> None:
        self.values = [one, some, named, maybe, text, default, object]


VALUES = {"type": "Paths", "one": "~/i", "some": ["a", "../b", "/c"], "named": {"k": "a"}, "maybe": "m", "object": "o"}


def test_a_class_gets_absolute_paths_and_a_run_records_them_with_the_defaults(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", "/home/me")
    built = build(wrap(VALUES, Layer(0, "r.toml", "", ())), Holder).values
    some, named = [f"{here}/a", f"{tmp_path}/b", "/c"], {"k": f"{here}/a"}
    assert built == ["/home/me/i", some, named, f"{here}/m", "a/b", "data/x", here / "o"]
    recorded = with_absolute_paths(VALUES, describe(Holder))
    assert list(recorded.items()) == [
        ("type", "Paths"),
        ("one", "/home/me/i"),
        ("some", some),
        ("named", named),
        ("maybe", f"{here}/m"),
        ("object", f"{here}/o"),
        ("default", f"{here}/data/x"),
    ]
    monkeypatch.chdir(tmp_path)
    assert with_absolute_paths(recorded, describe(Holder)) == recorded, "from another folder"
    assert with_absolute_paths({**VALUES, "maybe": 3}, describe(Holder))["maybe"] == 3
    assert absolute("") == "", "no path is not the current folder"


def recipe_in(folder: Path, images: Path) -> Path:
    folder.mkdir()
    shutil.copytree(images, folder / "train")
    recipe = small_run.write_recipe(folder, Path("train"), steps=2)
    recipe.write_text(recipe.read_text().replace(str(folder / "runs"), "runs"))
    return recipe


def test_a_run_is_read_from_anywhere_and_resumes_whatever_form_its_paths_have(images, tmp_path, monkeypatch, capsys):
    recipe = recipe_in(tmp_path / "here", images)
    monkeypatch.chdir(recipe.parent)
    assert small_run.call(capsys, recipe)[0] == 0
    run = recipe.parent / "runs/small"
    values = tomli.loads((run / "config.toml").read_text())
    assert (values["data"]["source"]["data_prefix"], values["work_dir"]) == (f"{run.parents[1]}/train", str(run.parent))
    assert small_run.call(capsys, "config", "diff", recipe, run / "config.toml")[0] == 0, "no difference"
    printed = small_run.call(capsys, "config", "print", recipe)[1]
    assert 'data_prefix = "train"' in printed, "print shows what was typed"

    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    code, _, err = small_run.call(capsys, "eval", "knn", run, "--set", "eval.knn.k=[5]")
    assert code == 0 and "relative" not in err

    old = values | {"work_dir": "runs", "data": values["data"] | {"source": {"type": "ImageFolder"}}}
    old["data"]["source"]["data_prefix"] = "train"  # as runs recorded it before
    (run / "config.toml").write_text(tomli_w.dumps(old))
    code, _, err = small_run.call(capsys, "eval", "knn", run)
    assert code == 2 and f"train does not exist (relative to {tmp_path}/there)" in err
    shutil.copytree(images, "train")
    code, _, err = small_run.call(capsys, "eval", "knn", run, "--set", "eval.knn.k=[5]")
    assert code == 0 and f"relative paths (work_dir, data.source.data_prefix), which start from {tmp_path}/there" in err

    monkeypatch.chdir(recipe.parent)
    assert small_run.call(capsys, recipe, "--resume", "--set", "max_iters=3")[0] == 0, "the old run, from its folder"
    assert tomli.loads((run / "config.toml").read_text())["data"] == values["data"]


def test_a_resume_refuses_other_images_but_not_a_project_that_was_moved(tmp_path):
    def with_images(path: Path) -> dict:
        return RECIPE | {"data": {"source": {"type": "ImageFolder", "data_prefix": str(path)}}}

    used = used_folder(tmp_path / "run")
    (used / "config.toml").write_text(dump(with_images(tmp_path / "old/train")))
    RunFolder(used, with_images(tmp_path / "new/train"), resume="").close()
    (tmp_path / "new/train").mkdir(parents=True)
    for other in ("newer/train", "new/test"):
        with pytest.raises(UsageError, match=r"another recipe; a resume cannot change data\.source\.data_prefix"):
            RunFolder(used, with_images(tmp_path / other), resume="")


def test_the_home_folder_is_meant_in_paths_of_a_recipe(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipe_in(tmp_path / "home", images)
    recipe = tmp_path / "mine.toml"
    recipe.write_text('extends = "~/small.toml"\nwork_dir = "~/runs"\n[data.source]\ndata_prefix = "~/train"\n')
    assert small_run.call(capsys, recipe)[0] == 0
    assert (tmp_path / "home/runs/mine/config.toml").exists() and not os.path.exists("~")
    assert small_run.call(capsys, recipe, "--resume=~/runs/mine")[0] == 0
