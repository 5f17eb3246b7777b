"""`sslrun config diff`: all differences and nothing else, aligned lists, colors on a terminal only."""

import dataclasses
import json
import os
import pty
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslrun.cli import main
from sslrun.config import dump, load
from sslrun.config.diff import differences, render
from sslrun.config.dump import laid_out
from sslrun.config.explain import explain_all
from sslrun.config.node import Layer, Node, plain, wrap
from sslrun.config.schema_reader import Setting, committed_schema, parts
from sslrun.nn.heads import ContrastiveHead

ROOT = Path(__file__).parents[1]
ALIASES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").glob("*.toml"))
MOCOV2 = "configs/mocov2.toml"
DATA = "configs/_base_/datasets/imagenet_mocov2.toml"
GRAY, FLIP = '{ type = "RandomGrayscale", p = 0.2 }', '{ type = "RandomHorizontalFlip" }'
BLUR = '{ type = "GaussianBlur", sigma_min = 0.1, sigma_max = 2.0 }'


OWN_HEAD = """
from collections.abc import Sequence
from sslrun.nn.heads import ContrastiveHead
from sslrun.config.paths import FilePath

class OwnHead(ContrastiveHead):
    def __init__(self, width: int = 3, folder: FilePath = "x", sizes: Sequence[int] = (1, 2)) -> None:
        super().__init__()
"""


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")


def diff(*words):
    """(key of the old, old value, key of the new, new value) of each difference between two configurations.

    Words are `--set` texts, those before the word "|" of the old one.
    """
    middle = words.index("|")
    found = differences(load(MOCOV2, words[:middle]), load(MOCOV2, words[middle + 1 :]))
    lines = render(found, ("", ""), 10_000).splitlines()[3:]
    return [" ".join(line.split()) for line in lines]


def transforms(*elements):
    return f"data.views.0.transforms=[{', '.join(elements)}]"


def views(*groups):
    return "data.views=[" + ", ".join(f"{{ num_views = {n}, transforms = [{t}] }}" for n, t in groups) + "]"


class TestValues:
    def test_changed(self):
        assert diff("|", "epochs=800") == [
            "epochs",
            "- 200 configs/_base_/schedules/sgd_coslr-200e_in1k.toml:5",
            "+ 800 --set epochs=800",
        ]

    def test_only_one_side_has_it(self):
        assert diff("|", "load_from='x'") == ["load_from", "+ \"x\" --set load_from='x'"]
        assert diff("load_from='x'", "|") == ["load_from", "- \"x\" --set load_from='x'"]
        assert diff("|", "optimizer.grad_clip.max_norm=1") == [
            "optimizer.grad_clip",
            "+ { max_norm = 1 } --set optimizer.grad_clip.max_norm=1",
        ]

    def test_an_absent_key_equals_its_default(self):
        assert diff("|", "data.prefetch=2", "monitor.knn_k=20") == []
        assert diff("monitor.knn_k=3", "|") == [
            "monitor.knn_k",
            "- 3 --set monitor.knn_k=3",
            "+ 20 default of the code",
        ]

    def test_stated_defaults_of_parts_are_no_difference(self):
        bn = "model.backbone.norm_cfg={ type = 'BN', eps = 0.00001 }"
        assert diff("|", "monitor={}", "eval.knn={}", "model.backbone.out_indices=[4]", bn) == []
        neck = (
            "model.neck={ _delete_ = true, type = 'NonLinearNeck', in_channels = 8, hid_channels = 8, out_channels = 8"
        )
        assert diff(neck + " }", "|", neck + ", norm_cfg = { type = 'SyncBN' } }") == []
        assert diff("|", "model.backbone.norm_cfg.momentum=0.5")[0] == "model.backbone.norm_cfg.momentum"

    def test_defaults_that_depend_on_another_key_are_no_difference(self):
        def vit(keys: str) -> str:
            return f"model.backbone={{ _delete_ = true, type = 'VisionTransformer'{keys} }}"

        assert diff(vit(""), "|", vit(", arch = 'small', embed_dim = 384, depth = 12")) == []
        assert diff(vit(", arch = 'base'"), "|", vit(", arch = 'base', embed_dim = 768")) == []
        assert [line for line in diff(vit(""), "|", vit(", arch = 'base'")) if line[0] not in "+-"] == [
            "model.backbone.arch", "model.backbone.embed_dim",
        ]  # fmt: skip
        shapes = "data.source={ _delete_ = true, type = 'Shapes', split = 'test'"
        assert diff(shapes + " }", "|", shapes + ", num_images = 1000 }") == []
        assert len(diff(shapes + " }", "|", shapes + ", num_images = 5000 }")) == 3

    def test_defaults_of_two_classes_are_compared(self):
        """Neither recipe sets weight_decay: 0 for SGD, 0.01 for AdamW. Only AdamW has betas, only SGD nesterov."""
        sgd, adamw = (f"optimizer={{ _delete_ = true, type = '{name}', lr = 1 }}" for name in ("SGD", "AdamW"))
        stated = "optimizer={ _delete_ = true, type = 'AdamW', lr = 1, weight_decay = 0.01, betas = [0.9, 0.999] }"
        found = diff(sgd, "|", adamw)
        assert [line.split(" --set")[0] for line in found] == [
            "optimizer.type", '- "SGD"', '+ "AdamW"',
            "optimizer.weight_decay", "- 0.0 default of the code", "+ 0.01 default of the code",
        ]  # fmt: skip
        assert {line for line in diff(sgd, "|", stated) if line[0] not in "+-"} == {found[0], found[3]}
        assert "optimizer.nesterov" in diff(sgd.replace("}", ", momentum = 0.9, nesterov = true }"), "|", adamw)

    def test_defaults_of_own_classes_count_if_they_are_imported(self, capsys, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "own_head.py").write_text(OWN_HEAD)
        names = ["old.toml", "new.toml"]
        for name, keys in zip(names, ("", ", width = 3, folder = 'x', sizes = [1, 2]"), strict=True):
            head = f"{{ _delete_ = true, type = 'OwnHead'{keys} }}"
            start = f"extends = '{ROOT / MOCOV2}'\ncustom_imports = ['own_head']\n"
            (tmp_path / name).write_text(f"{start}model.head = {head}\n")
        words = ["config", "diff", *(str(tmp_path / name) for name in names)]
        try:
            assert main(words) == 1
            assert "model.head.width" in capsys.readouterr().out
            assert main([*words, "--allow-imports", "own_head"]) == 0
            assert main([*words, "--set", "model.head.width=4", "--allow-imports", "own_head"]) == 1
            assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[-3:]] == [
                "model.head.width", "", ""
            ]  # fmt: skip
        finally:
            ContrastiveHead.registry.pop("OwnHead", None)
            sys.modules.pop("own_head", None)

    def test_a_path_is_the_same_from_another_folder(self, tmp_path):
        assert diff("load_from='x'", "|", f"load_from='{ROOT / 'x'}'") == []

    def test_numbers_are_compared_by_value_and_booleans_are_no_numbers(self):
        assert diff("optimizer.lr=1", "|", "optimizer.lr=1.0") == []
        whole, broken = (transforms(f'{{ type = "ColorJitter", hue = [{zero}, 1] }}') for zero in ("0", "0.0"))
        assert diff(whole, "|", broken) == []
        mine = ["custom_imports=['my']", "model.head.type=Mine"]
        assert diff(*mine, "model.head.x=1", "|", *mine, "model.head.x=true")[0] == "model.head.x"
        assert diff(*mine, "model.head.x=nan", "|", *mine, "model.head.x=nan") == []

    def test_vars_count_through_the_values_that_refer_to_them(self):
        assert diff("|", "vars.other=1") == []
        found = diff("|", "vars.mean=[0.5, 0.5, 0.5]")
        assert found == [
            "data.views.0.transforms.5.mean",
            f"- [0.485, 0.456, 0.406] {DATA}:27",
            f"+ [0.5, 0.5, 0.5] {DATA}:27",
        ]

    def test_a_changed_class(self):
        assert diff("|", "lr.policy=Constant", "lr._delete_=['min_lr']")[:3] == [
            "lr.policy",
            '- "CosineAnnealing" configs/_base_/schedules/sgd_coslr-200e_in1k.toml:7',
            '+ "Constant" --set lr.policy=Constant',
        ]

    def test_a_number_for_a_table(self):
        assert diff("data.holdout=0.1", "|", "data.holdout={ type='Shapes' }")[1:] == [
            "- 0.1 --set data.holdout=0.1",
            "+ { type = \"Shapes\" } --set data.holdout={ type='Shapes' }",
        ]


class TestLists:
    def test_an_inserted_element_is_one_difference(self):
        assert diff(transforms(GRAY, FLIP), "|", transforms(GRAY, BLUR, FLIP))[:2] == [
            "data.views.0.transforms.1",
            f"+ {BLUR} --set {transforms(GRAY, BLUR, FLIP)}",
        ]
        assert len(diff(transforms(GRAY, FLIP), "|", transforms(GRAY, BLUR, FLIP))) == 2

    def test_a_removed_element(self):
        assert diff(transforms(BLUR, GRAY), "|", transforms(GRAY)) == [
            "data.views.0.transforms.0",
            f"- {BLUR} --set {transforms(BLUR, GRAY)}",
        ]

    def test_a_changed_element_behind_an_inserted_one(self):
        found = diff(transforms(GRAY, FLIP), "|", transforms(BLUR, GRAY.replace("0.2", "0.5"), FLIP))
        assert [line for line in found if line[0] not in "+-"] == [
            "data.views.0.transforms.0",
            "data.views.0.transforms.0.p -> data.views.0.transforms.1.p",
        ]

    def test_a_moved_and_changed_element(self):
        found = diff(transforms(GRAY, BLUR, FLIP), "|", transforms(BLUR, FLIP, GRAY.replace("0.2", "0.5")))
        assert [line.split(" --set")[0] for line in found] == [
            "data.views.0.transforms.0 -> data.views.0.transforms.2: RandomGrayscale moved",
            "-",
            "+",
            "data.views.0.transforms.0.p -> data.views.0.transforms.2.p",
            "- 0.2",
            "+ 0.5",
        ]

    def test_two_moved_elements_of_one_class_are_told_apart(self):
        often = GRAY.replace("0.2", "0.5")
        found = diff(transforms(GRAY, often, BLUR, FLIP), "|", transforms(BLUR, FLIP, often, GRAY))
        assert [line for line in found if line[0] not in "+-"] == [
            "data.views.0.transforms.1 -> data.views.0.transforms.2: RandomGrayscale moved",
            "data.views.0.transforms.0 -> data.views.0.transforms.3: RandomGrayscale moved",
        ]

    def test_an_element_of_another_class_is_not_changed_key_by_key(self):
        found = diff(transforms(GRAY), "|", transforms(FLIP))
        assert [line.split(" --set")[0] for line in found] == [
            "data.views.0.transforms.0", f"- {GRAY}", "data.views.0.transforms.0", f"+ {FLIP}",
        ]  # fmt: skip

    def test_elements_that_differ_only_in_a_stated_default_are_equal(self):
        assert diff(transforms(FLIP), "|", transforms('{ type = "RandomHorizontalFlip", p = 0.5 }')) == []

    def test_elements_are_aligned_by_what_they_do(self):
        """The second of three alike is removed; the third states a default and 1 as 1.0."""
        often, always = '{ type = "RandomGrayscale", p = 0.5 }', '{ type = "RandomGrayscale", p = 1 }'
        found = diff(transforms(GRAY, often, always), "|", transforms(GRAY, always.replace("1", "1.0")))
        assert [line.split(" --set")[0] for line in found] == ["data.views.0.transforms.1", f"- {often}"]

    def test_groups_of_views(self):
        small = "{ type = 'RandomResizedCrop', size = 96 }"
        assert diff(views((2, BLUR)), "|", views((2, BLUR), (6, small)))[0] == "data.views.1"
        assert diff(views((2, BLUR), (6, small)), "|", views((6, small)))[0] == "data.views.0"
        found = diff(views((2, BLUR), (6, small)), "|", views((2, BLUR), (4, small)))
        assert [line.split(" --set")[0] for line in found] == ["data.views.1.num_views", "- 6", "+ 4"]

    def test_from_no_rules_to_one(self):
        rule = "optimizer.paramwise=[{ match = 'x' }]"
        assert diff("|", rule) == ["optimizer.paramwise.0", f'+ {{ match = "x" }} --set {rule}']

    def test_lists_of_values_are_values(self):
        assert diff("|", "model.backbone.out_indices=[3, 4]")[1:] == [
            "- [4] configs/_base_/models/mocov2.toml:15",
            "+ [3, 4] --set model.backbone.out_indices=[3, 4]",
        ]
        assert len(diff("log.hooks=['wandb']", "|")) == 3


@pytest.mark.parametrize("number", [3, pytest.param(len(ALIASES), marks=pytest.mark.nightly)])
def test_only_equal_recipes_do_not_differ(number):
    """Each with itself and those that follow it."""
    configs = [load(path) for path in ALIASES]
    for a, one in enumerate(configs):
        for b in range(a, a + number):
            assert bool(differences(one, configs[b % len(configs)])) == (a != b), (ALIASES[a], b)


@pytest.mark.parametrize("path", [ROOT / "configs/quickstart.toml", *(ROOT / "configs/learn").glob("*.toml")], ids=str)
def test_a_recipe_with_every_default_stated_does_not_differ(path):
    config, schema = load(str(path)), committed_schema()

    def stated(setting: Setting) -> Node:
        if not isinstance(setting.node.value, dict | list):
            return setting.node
        below = parts(schema["$defs"], setting)
        for part, each in below.items():
            if each.node is None and "default" in each.schema:
                below[part] = each._replace(node=wrap(each.schema["default"], Layer(0, "stated", "", ())))
        values = {part: stated(each) for part, each in below.items() if each.node is not None}
        return setting.node._replace(value=values if isinstance(setting.node.value, dict) else [*values.values()])

    full = dataclasses.replace(config, root=stated(Setting((), config.root, schema)))
    assert len(dump(plain(full.root))) > 2 * len(dump(config.values))
    assert differences(config, full) == differences(full, config) == []


@pytest.mark.parametrize("width", [10, 16, 17, 30, 49])
def test_a_value_is_laid_out_within_the_width(width):
    value = {"mean": [123, 456], "table": {"a": [{"b": 1, "c": 22}]}}
    lines = laid_out(value, width)
    assert max(map(len, lines)) <= max(width, len("          c = 22,"))
    assert tomllib.loads("x = " + re.sub(r",\s*([\]}])", r"\1", "".join(lines)))["x"] == value


keys = st.sampled_from(["a", "b", "type"])
leaves = st.integers(0, 2) | st.booleans() | st.sampled_from(["x", "y", "${"])
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=3), max_leaves=12)
tables = st.dictionaries(keys, values, max_size=3)


@settings(max_examples=200, deadline=None)
@given(tables, tables)
def test_unequal_values_differ_whatever_they_are(tmp_path_factory, old, new):
    folder = tmp_path_factory.mktemp("diff")
    for name, table in (("old", old), ("new", new)):
        (folder / f"{name}.toml").write_text(dump(table))
    a, b = (load(folder / f"{name}.toml", (), {}) for name in ("old", "new"))
    there, back = differences(a, b, {}), differences(b, a, {})
    assert bool(there) == bool(back) == (json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True))
    render(there, ("old", "new"), 60)
    for config in (a, b):
        assert differences(config, config, {}) == []
        explain_all(config, "", {}, 60)


class TestCommand:
    def test_exit_codes(self, capsys):
        assert main(["config", "diff", MOCOV2, MOCOV2]) == 0
        assert capsys.readouterr().out == "no difference\n"
        assert main(["config", "diff", MOCOV2, "--set", "epochs=800"]) == 1
        assert capsys.readouterr().out == (
            "--- configs/mocov2.toml\n+++ configs/mocov2.toml --set epochs=800\n\nepochs\n"
            f"  - 200{'configs/_base_/schedules/sgd_coslr-200e_in1k.toml:5':>93}\n"
            f"  + 800{'--set epochs=800':>93}\n"
        )
        assert main(["config", "diff", MOCOV2, "configs/none.toml"]) == 2
        captured = capsys.readouterr()
        assert not captured.out and captured.err.startswith("error: configs/none.toml: No such file")

    def test_set_applies_to_the_second_config(self, capsys):
        assert main(["config", "diff", MOCOV2, "configs/mocov1.toml", "--set", "model.momentum=0.5"]) == 1
        assert "  + 0.5" in capsys.readouterr().out

    def test_a_long_value_is_laid_out_over_lines(self):
        found = differences(load(MOCOV2, [views((2, GRAY))]), load(MOCOV2, [views((2, GRAY), (6, f"{BLUR}, {FLIP}"))]))
        assert render(found, ("a", "b"), 60).splitlines()[4:-1] == [
            "  + {",
            "  +   num_views = 6,",
            "  +   transforms = [",
            "  +     {",
            '  +       type = "GaussianBlur",',
            "  +       sigma_min = 0.1,",
            "  +       sigma_max = 2.0,",
            "  +     },",
            '  +     { type = "RandomHorizontalFlip" },',
            "  +   ],",
            "  + }",
        ]

    @pytest.mark.parametrize(
        ("variables", "is_colored"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
    )
    def test_colors_on_a_terminal_only(self, variables, is_colored):
        environment = {**os.environ, "PYTHONPATH": "engine", "TERM": "xterm", **variables}
        words = [sys.executable, "bin/sslrun", "config", "diff", MOCOV2, "--set", "epochs=800"]
        controller, terminal = pty.openpty()
        done = subprocess.run(words, env=environment, stdout=terminal, stderr=subprocess.PIPE)
        os.close(terminal)
        seen = os.read(controller, 65536).decode()
        assert done.returncode == 1 and ("\x1b[31m  - 200\x1b[0m" in seen) is is_colored and "200" in seen
        assert ("\x1b" in seen) is is_colored
        piped = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert "\x1b" not in piped.stdout and "- 200" in piped.stdout
