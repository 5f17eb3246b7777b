"""The recipes that ship, the committed schema, and what the config verbs promise about speed and imports."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslrun.config import dump, load
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


def test_mocov2_is_the_tutorials():
    normalize = {"type": "Normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    jitter = {"type": "ColorJitter", "p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    values = load(MOCOV2).values
    assert values["model"] == {
        "type": "MoCo",
        "queue_len": 65536,
        "feat_dim": 128,
        "momentum": 0.999,
        "backbone": {
            "type": "ResNet",
            "depth": 50,
            "in_channels": 3,
            "out_indices": [4],
            "norm_cfg": {"type": "BN"},
        },
        "neck": {
            "type": "MoCoV2Neck",
            "in_channels": 2048,
            "hid_channels": 2048,
            "out_channels": 128,
            "with_avg_pool": True,
        },
        "head": {"type": "ContrastiveHead", "temperature": 0.2},
    }
    assert values["data"] == {
        "samples_per_gpu": 32,
        "workers_per_gpu": 4,
        "drop_last": True,
        "source": {
            "type": "ImageNet",
            "data_prefix": "data/imagenet/train",
            "ann_file": "data/imagenet/meta/train.txt",
        },
        "views": [
            {
                "num_views": 2,
                "transforms": [
                    {"type": "RandomResizedCrop", "size": 224, "scale": [0.2, 1.0]},
                    jitter,
                    {"type": "RandomGrayscale", "p": 0.2},
                    {"type": "GaussianBlur", "p": 0.5, "sigma_min": 0.1, "sigma_max": 2.0},
                    {"type": "RandomHorizontalFlip", "p": 0.5},
                    normalize,
                ],
            }
        ],
    }
    assert values["optimizer"] == {"type": "SGD", "lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4}
    assert values["lr"] == {"policy": "CosineAnnealing", "min_lr": 0.0, "by": "epoch"}
    assert values["epochs"] == 200 and values["global_batch"] == 8 * 32
    assert values["checkpoint"] == {"interval": 10, "by": "epoch", "max_keep_ckpts": 3}
    assert values["log"]["interval"] == 50


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


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("runner.max_epochs=3", "runner.max_epochs is written epochs, at the top level"),
        ("runner.type=EpochBasedRunner", "runner is gone: write epochs (or max_iters) at the top level"),
        ("_base_=x.py", '_base_ is written extends = "path", or a list of paths'),
        ("lr_config.min_lr=0.0", "lr_config is written [lr]"),
        ("checkpoint_config.interval=1", "checkpoint_config is written [checkpoint]"),
        ("log_config.interval=1", "log_config is written [log]"),
        ("optimizer_config.coalesce=true", "optimizer_config is gone: gradient clipping is optimizer.grad_clip"),
        ("optimizer_config.grad_clip.max_norm=1", "optimizer_config.grad_clip is written optimizer.grad_clip"),
        (
            "optimizer.paramwise_options={ head = { momentum = 0.0 } }",
            "optimizer.paramwise_options is written [[optimizer.paramwise]], each with match (a regular expression)",
        ),
        ("data.train.data_source.type=ImageNet", "data.train.data_source is written data.source"),
        (
            "data.train.pipelines=[]",
            "data.train.pipelines is written [[data.views]]: one table per group of equal views, "
            "with num_views and transforms",
        ),
        (
            "data.num_views=[2]",
            "data.num_views is written [[data.views]]: one table per group of equal views, "
            "with num_views and transforms",
        ),
        (
            "dist_params.backend=nccl",
            "dist_params is gone: what concerns machines stands in [engine], ranks come from the launcher",
        ),
        (
            "persistent_workers=true",
            "persistent_workers is gone: loader threads live as long as the run; see [engine] and data.prefetch",
        ),
        ("prefetch=true", "prefetch is written data.prefetch"),
        ("log_level=INFO", "log_level is written log.level"),
        ("lr.by_epoch=false", 'lr.by_epoch is written lr.by = "epoch" or lr.by = "iter"'),
        (
            "lr.warmup_by_epoch=true",
            "lr.warmup_by_epoch is gone: the length of the warm-up is written warmup_epochs, or warmup_iters",
        ),
        (
            "checkpoint.by_epoch=true",
            'checkpoint.by_epoch is written checkpoint.by = "epoch" or checkpoint.by = "iter"',
        ),
        ("workflow=[]", "workflow is gone: the loss on data.holdout every n epochs is monitor.loss_interval = n"),
        ("evaluation.interval=1", "evaluation is written [monitor]: knn_interval, loss_interval"),
    ],
)
def test_old_names_are_answered(override, hint):
    with pytest.raises(UsageError) as caught:
        load("configs/mocov2.toml", [override])
    key = hint.split(" is ")[0]
    key = (
        "data.train"
        if key.startswith("data.train")
        else key.split(".")[0]
        if "_config" in key or "runner" in key
        else key
    )
    assert str(caught.value) == f"--set {override}: {key}: unknown key: {hint}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.queue_lenn=3", "model.queue_lenn: unknown key of MoCo; did you mean queue_len?"),
        ("model.queue_len=3.5", "model.queue_len: expected a whole number, got the number 3.5"),
        ("model.head.temperature=true", "model.head.temperature: expected a number, got the boolean true"),
        (
            "model.neck.type=MoCov2Neck",
            "model.neck.type: there is no 'MoCov2Neck' among the necks; did you mean MoCoV2Neck or ODCNeck?",
        ),
        ("lr.policy=Cosine", "lr.policy: there is no 'Cosine' among the schedules; Cosine is CosineAnnealing here"),
        ("lr.policy=step", "lr.policy: there is no 'step' among the schedules; did you mean Step?"),
        ("lr.policy=poly", "lr.policy: there is no 'poly' among the schedules; did you mean Poly?"),
        ("lr.policy=fixed", "lr.policy: there is no 'fixed' among the schedules; fixed is Constant here"),
        (
            "lr.policy=StepFixCosineAnnealing",
            "lr.policy: there is no 'StepFixCosineAnnealing' among the schedules; StepFixCosineAnnealing is "
            "CosineAnnealing with after_warmup = true here",
        ),
        ("max_iters=5", "epochs and max_iters are both set"),
    ],
)
def test_misspelled_keys_and_wrong_types(override, message):
    with pytest.raises(UsageError) as caught:
        load("configs/mocov2.toml", [override])
    assert str(caught.value).startswith(f"--set {override}: {message}")


def test_a_recipe_with_an_own_component_loads_without_its_module():
    config = load("configs/mocov2.toml", ['custom_imports=["my_pkg.my_head"]', "model.head.type=MyHead"])
    assert config.values["model"]["head"] == {"type": "MyHead", "temperature": 0.2}
    assert config.notes == [
        "--set model.head.type=MyHead: model.head.type: "
        'the string "ContrastiveHead" was replaced by the string "MyHead"; '
        "kept from before: temperature (configs/_base_/models/mocov2.toml:27)"
    ]


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


def test_loading_is_light():
    code = """
import json, sys
from sslrun.config import dump, load
config = load("configs/mocov2.toml", ["epochs=800"])
dump(config.values)
heavy = ("torch", "numpy", "nvidia", "sslrun.config.annotations", "sslrun.config.build", "sslrun.recipe", "difflib")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    assert json.loads(python("-c", code).stdout) == []
