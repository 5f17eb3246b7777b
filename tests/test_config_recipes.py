"""The shipped recipes, the committed schema, hints at old names, and the imports of config verbs."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslrun.config import dump, load
from sslrun.config.naming import SCHEDULES
from sslrun.config.node import show
from sslrun.config.old_names import RENAMED, RENAMED_CLASSES
from sslrun.config.schema_reader import committed_schema
from sslrun.errors import UsageError

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.toml") if not {"_base_", "benchmarks"} & set(path.parts))
MOCOV2 = CONFIGS / "selfsup/mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k.toml"


def python(*arguments):
    path = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_800_epoch_sibling_changes_only_the_epochs():
    sibling = MOCOV2.with_name(MOCOV2.name.replace("200e", "800e"))
    assert load(sibling).values == load(MOCOV2).values | {"epochs": 800}
    assert tomllib.loads(sibling.read_text()) == {"extends": MOCOV2.name, "epochs": 800}


def test_the_alias_carries_the_full_name():
    alias = load("configs/mocov2.toml")
    assert alias.name == MOCOV2.stem and alias.values == load(MOCOV2).values
    assert load("configs/quickstart.toml").name == "quickstart"


def test_every_recipe_loads_and_what_is_printed_loads_as_the_same_recipe(tmp_path):
    assert len(RECIPES) > 50
    printed = tmp_path / "printed.toml"
    for path in RECIPES:
        name = str(path.relative_to(ROOT))
        config = load(name, ["work_dir='a$${x}'"])
        assert config.notes == [], name
        comment = path.read_text().split("\n\n")[0]
        assert comment.startswith("#") and f"bin/sslrun {name}" in comment, "the command stands at the head"
        chains = [origin.layer.chain for origin in config.origins("") if origin.line is not None]
        assert max(map(len, chains)) <= 4, f"{name}: an alias and three levels below it"
        printed.write_text(dump(config.values))
        assert load(printed).values == config.values and config.values["work_dir"] == "a${x}", name


# Folder of building blocks -> tables and keys that its files may set. Files beside the folders set what is left.
SUBJECTS = {
    "models": {"model", "optimizer", "vars"},
    "datasets": {"data", "monitor", "eval", "vars"},
    "schedules": {"epochs", "max_iters", "global_batch", "optimizer", "lr", "vars"},
}
OF_RECIPES = {"model", "data", "optimizer", "lr", "epochs", "max_iters", "global_batch"}


def disorder(configs):
    """What makes the building blocks and the recipes of a folder of configs hard to find one's way in."""
    blocks = configs / "_base_"
    tables = {path: tomllib.loads(path.read_text()) for path in configs.rglob("*.toml")}
    bases = {path: [table.pop("extends", [])] for path, table in tables.items()}
    bases = {path: named[0] if isinstance(named[0], list) else named for path, named in bases.items()}
    for path in sorted(blocks.rglob("*.toml")):
        table, folder = tables[path], path.parent.name
        if not all((path.parent / base).resolve().is_relative_to(blocks) for base in bases[path]):
            yield f"{path.name} extends a recipe"
        foreign = table.keys() - SUBJECTS[folder] if folder in SUBJECTS else table.keys() & OF_RECIPES
        if foreign or (folder == "models" and table.get("optimizer", {}).keys() - {"paramwise"}):
            yield f"{path.name} sets keys of another folder"
        if folder == "schedules":
            optimizer, schedule, epochs = re.match(r"([a-z]+)_([a-z]+lr)-(\d+)e", path.stem).groups()
            does = table["optimizer"]["type"].lower(), table["lr"]["policy"], table["epochs"]
            if does != (optimizer, SCHEDULES[schedule], int(epochs)):
                yield f"{path.name} does something else"
    primitive = Counter()
    for path in (path for path in tables if "_base_" not in path.parts and any("_base_" in b for b in bases[path])):
        if "selfsup" in path.parts:
            model = load(path).values["model"]
            primitive[path.parent.name, model["type"], model["backbone"]["type"]] += 1
    yield from (f"{kind} has {count} primitive recipes" for kind, count in primitive.items() if count > 1)


def test_building_blocks_keep_to_their_subject_and_recipes_extend_one_primitive(tmp_path):
    assert list(disorder(CONFIGS)) == []
    shutil.copytree(CONFIGS, tmp_path / "configs")
    blocks, recipes = tmp_path / "configs/_base_", tmp_path / "configs/selfsup/mocov2"
    (blocks / "models/a.toml").write_text("optimizer.lr = 1")
    (blocks / "datasets/b.toml").write_text('extends = "../../mocov2.toml"\nepochs = 1')
    (blocks / "schedules/sgd_steplr-9e.toml").write_text('epochs = 9\noptimizer.type = "SGD"\nlr.policy = "Poly"')
    (blocks / "runtime.toml").write_text("lr.a = 1")
    (recipes / "second.toml").write_text((recipes / MOCOV2.name).read_text())
    assert sorted(disorder(tmp_path / "configs")) == [
        "('mocov2', 'MoCo', 'ResNet') has 2 primitive recipes",
        "a.toml sets keys of another folder",
        "b.toml extends a recipe",
        "b.toml sets keys of another folder",
        "runtime.toml sets keys of another folder",
        "sgd_steplr-9e.toml does something else",
    ]


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=6) | st.sampled_from(
    ["${a}", "$${", "$$${a}", "a.b"]
)
leaves = st.integers() | st.booleans() | st.floats(allow_nan=False) | texts | st.datetimes() | st.dates() | st.times()
nested = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=10)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(texts, nested, max_size=4))
def test_any_values_survive_printing(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("dump") / "x.toml"
    path.write_text(dump(values), encoding="utf-8", newline="\n")
    assert load(path, (), {}).values == values


def test_old_names_are_answered():
    for old, hint in RENAMED.items():
        with pytest.raises(UsageError) as caught:
            load("configs/mocov2.toml", [f"{show(old)}=1"])
        place, _, answer = str(caught.value).partition(": unknown key: ")
        assert answer == f"{show(old)} {hint}"
        assert place.startswith(f"--set {show(old)}=1: ") and show(old).startswith(place.rpartition(": ")[2])
    for old_class, ours in RENAMED_CLASSES["schedules"].items():
        with pytest.raises(UsageError) as caught:
            load("configs/mocov2.toml", [f"lr.policy={old_class.upper()}"])
        assert str(caught.value).endswith(f"among the schedules; {old_class.upper()} is {ours} here")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.neck.type=MoCov2Neck",
            "model.neck.type: there is no 'MoCov2Neck' among the necks; did you mean MoCoV2Neck or ODCNeck?",
        ),
        ("lr.policy=step", "lr.policy: there is no 'step' among the schedules; did you mean Step?"),
        ("lr.policy=poly", "lr.policy: there is no 'poly' among the schedules; did you mean Poly?"),
    ],
)
def test_a_misspelled_class_is_answered_with_the_nearest(override, message):
    with pytest.raises(UsageError) as caught:
        load("configs/mocov2.toml", [override])
    assert str(caught.value).startswith(f"--set {override}: {message}")


def test_the_committed_schema_is_current():
    result = python("-m", "sslrun.config.schema", "--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_key_is_typed_and_described():
    silent = []
    for name, table in committed_schema()["$defs"].items():
        for key, schema in table.get("properties", {}).items():
            is_tag = schema.get("enum") == [table["title"]]
            if not is_tag and not (schema.get("description") and set(schema) - {"description", "default"}):
                silent.append(f"{name}: {key}")
    assert silent == []


def test_loading_imports_nothing_heavy():
    code = """
import json, sys
from sslrun.config import dump, load
config = load("configs/mocov2.toml", ["epochs=800"])
dump(config.values)
heavy = ("torch", "numpy", "nvidia", "sslrun.config.annotations", "sslrun.config.build", "sslrun.recipe", "difflib")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    assert json.loads(python("-c", code).stdout) == []
