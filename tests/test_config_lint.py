"""config lint: shipped files have no findings, and every rule finds its violations and nothing else."""

from collections import Counter
from pathlib import Path

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sslrun.cli import main
from sslrun.config.files import line_up
from sslrun.config.lint import kind_of, toml_files

ROOT = Path(__file__).parents[1]
RECIPES, BLOCKS = ROOT / "configs/selfsup", ROOT / "configs/_base_"
MOCOV2 = RECIPES / "mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k.toml"
NPID = RECIPES / "npid/npid_resnet50_8xb32-steplr-200e_in1k.toml"
SWAV = RECIPES / "swav/swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96.toml"
SOBEL = RECIPES / "deepcluster/deepcluster-sobel_resnet50_8xb64-steplr-200e_in1k.toml"
LINEAR = ROOT / "configs/benchmarks/linear_8xb32-steplr-100e_in1k.toml"
VIT = RECIPES / "mocov3/mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k.toml"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """`write("a.toml", text, base, ...)` writes a file that extends the bases, into the current folder."""
    monkeypatch.chdir(tmp_path)

    def write_file(name, text="", *bases):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        extends = ", ".join(f'"{base if Path(base).is_absolute() else tmp_path / base}"' for base in bases)
        path.write_text((f"extends = [{extends}]\n" if bases else "") + text)
        return name

    return write_file


@pytest.fixture
def lint(capsys):
    """`lint("a.toml")` gives its findings without the name of the file, `LINE: MESSAGE`."""

    def findings(name):
        capsys.readouterr()
        code = main(["config", "lint", str(name)])
        out, err = capsys.readouterr()
        assert (code, err) == (1 if out else 0, "1 file checked\n")
        prefix = f"{name}:"
        assert all(line.startswith(prefix) for line in out.splitlines())
        return [line.removeprefix(prefix) for line in out.splitlines()]

    return findings


def test_shipped_files_have_no_findings(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["config", "lint", "configs"]) == 0
    out, err = capsys.readouterr()
    files = toml_files(["configs"])
    assert (out, err) == ("", f"{len(files)} files checked\n")
    kinds = {file: kind_of(file, line_up(file)[-1]) for file in files}
    assert {file.parent for file in files if kinds[file] == "alias"} == {Path("configs")}
    assert {file for file in files if RECIPES.name in file.parts} == {f for f in files if kinds[f] == "recipe"}
    assert kinds[Path("configs/quickstart.toml")] == kinds[Path("configs/learn/byol.toml")] == "other"
    assert {file for file in files if kinds[file] == "benchmark"} == set(toml_files(["configs/benchmarks"]))
    assert min(Counter(kinds.values()).values()) > 5


CROP = "{ type = 'RandomResizedCrop', size = 224 }"
THREE_GROUPS = f"""
[[data.views]]
transforms = [{CROP}]
[[data.views]]
transforms = [{{ type = 'SharedTrans', transforms = [{CROP}] }}]
[[data.views]]
num_views = 6
transforms = [{CROP.replace("224", "96")}]
"""

FOLDER = 'data.source = { _delete_ = true, type = "ImageFolder", data_prefix = "x" }\n'
MINE = """custom_imports = ["my"]
model = { type = "Mine", backbone.type = "MyNet" }
lr.policy = "My"
data.source.type = "Other"
"""

# What a file extends -> what it sets itself -> its name -> the findings, LINE: what the name says, what the file does.
CASES: dict[Path, dict[str, dict[str, str]]] = {
    MOCOV2: {
        "": {
            "mocov2_resnet50_8xb32-coslr-200e_in1k": "",
            "mocov2-mine_resnet50-mlp_8xb32-randaug-amp-coslr-200e_in1k-10pct-224px": "",
            "mocov1_resnet50_8xb32-coslr-200e_in1k-224": "",
            "mocov2-swav_resnet50_8xb32-coslr-200e_in1k": "",
            "moco_resnet50w1_8xb32-accum1-coslr-200e_in1k": "",
            "mocov3_resnet50_8xb32-coslr-200e_in1k": "1: mocov3, which stands for MoCoV3, and model.type is MoCo",
            "byol-moco_resnet50_8xb32-coslr-200e_in1k": "1: byol-moco, which stands for BYOL, and model.type is MoCo",
            "mine_resnet50_8xb32-coslr-200e_in1k": "1: mine, which is no method that ships, and model.type is MoCo",
            "mocov2-sobel_resnet50_8xb32-coslr-200e_in1k": "1: sobel, and nothing in the recipe is a Sobel",
            "mocov2_resnet18_8xb32-coslr-200e_in1k": "1: resnet18, model.backbone.depth is 50",
            "mocov2_vit-small-p16_8xb32-coslr-200e_in1k": (
                "1: vit-small-p16, model.backbone is a ResNet, whose names begin like resnet50"
            ),
            "mocov2_resnet50_4xb32-coslr-200e_in1k": "1: 4 GPUs x 32 samples = 128, global_batch is 256",
            "mocov2_resnet50_8xb32-accum16-coslr-200e_in1k": (
                "1: 8 GPUs x 32 samples x 16 accumulated = 4096, global_batch is 256"
            ),
            "mocov2_resnet50_4xb64-coslr-200e_in1k": "1: 4xb64, data.samples_per_gpu is 32",
            "mocov2_resnet50_8xb32-steplr-200e_in1k": "1: steplr, lr.policy is CosineAnnealing (coslr)",
            "mocov2_resnet50_8xb32-coslr-800e_in1k": "1: 800 epochs, epochs is 200",
            "mocov2_resnet50_8xb32-coslr-100k_in1k": "1: 100,000 steps, epochs is 200",
            "mocov2_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k": "1: mcrop-2-6, the views are mcrop-2",
            "mocov2_resnet50_8xb32-coslr-200e_imagenet": "1: imagenet, data.source is ImageNet (in1k)",
            "mocov2_resnet50_8xb32-coslr-200e_in1k-384px": "1: 384 px, the views have 224 px",
            "mocov2_resnet50_8xb32-coslr-200e_in1k-224-96": "1: 224 and 96 px, the views have 224 px",
            "mocov2_resnet50-nofrz_8xb32-coslr-200e_in1k": "",
            "mocov2_resnext50-nofrz_8xb32-coslr-200e_in1k": "1: resnext, model.backbone.groups is 1",
            "mocov2_wide-resnet50_8xb32-coslr-200e_in1k": (
                "1: wide, model.backbone.width_per_group is 64 and model.backbone.base_width is 64"
            ),
        },
        'engine.precision = "fp32"': {"mocov2_resnet50_8xb32-coslr-200e_in1k": ""},
        "model.backbone.frozen_stages = 0": {
            "mocov2_resnet50-nofrz_8xb32-coslr-200e_in1k": "2: nofrz, model.backbone.frozen_stages is 0"
        },
        "model.backbone = { groups = 32, width_per_group = 4 }": {"mocov2_resnext50_8xb32-coslr-200e_in1k": ""},
        "model.backbone.width_per_group = 128": {"mocov2_wide-resnet50_8xb32-coslr-200e_in1k": ""},
        "model.backbone.base_width = 128": {"mocov2_wide-resnet50_8xb32-coslr-200e_in1k": ""},
        '_delete_ = ["epochs"]\nmax_iters = 100000': {
            "mocov2_resnet50_8xb32-coslr-100k_in1k": "",
            "mocov2_resnet50_8xb32-coslr-200e_in1k": "3: 200 epochs, max_iters is 100000",
        },
        "\nglobal_batch = 512": {"mocov2_resnet50_8xb32-coslr-200e_in1k": "3: 8 GPUs x 32 samples = 256"},
        FOLDER + "data.views.0.transforms.0.size = 160": {"mocov2_resnet50_8xb32-coslr-200e_cats": ""},
        FOLDER: {"mocov2_resnet50_8xb32-coslr-200e_in1k": ""},
        'data.source = { _delete_ = true, type = "Shapes" }': {
            "mocov2_resnet50_8xb32-coslr-200e_in1k": "2: in1k, data.source draws Shapes"
        },
        'data.source = { _delete_ = true, type = "CIFAR10" }\n': {
            "mocov2_resnet50_8xb32-coslr-200e_cifar10": (
                "1: cifar10 without a size, which means 32 px, the views have 224 px"
            )
        },
        MINE: {"mine_mynet_8xb32-mylr-200e_mine": ""},
    },
    LINEAR: {
        "": {
            "linear_8xb32-steplr-100e_in1k": "",
            "linear-mine_4xb64-steplr-100e_in1k-10pct": "",
            "linear_4xb32-steplr-100e_in1k": "1: 4 GPUs x 32 samples = 128, eval.linear.global_batch is 256",
            "linear_8xb32-accum2-steplr-100e_in1k": (
                "1: 8 GPUs x 32 samples x 2 accumulated = 512, eval.linear.global_batch is 256"
            ),
            "linear_8xb32-mcrop-2-steplr-100e_in1k": "1: mcrop-2, and evaluation takes one view of an image",
            "linear_8xb32-steplr-100k_in1k": "1: 100,000 steps, eval.linear.epochs is 100",
            "linear_8xb32-coslr-100e_in1k": "1: coslr, eval.linear.lr.policy is Step (steplr)",
            "linear_8xb32-steplr-90e_in1k": "1: 90 epochs, eval.linear.epochs is 100",
            "linear_8xb32-steplr-100e_places205": (
                "1: places205, eval.test is ImageNet (in1k); 1: places205, eval.train is ImageNet (in1k)"
            ),
            "finetune_8xb32-steplr-100e_in1k": "1: finetune, and eval.finetune is not set",
            "what_i_try": "",
        },
        "eval.linear.global_batch = 512": {"linear_8xb32-accum2-steplr-100e_in1k": ""},
        "eval.linear.transforms = [{ type = 'RandomResizedCrop', size = 160 }]": {
            "linear_8xb32-steplr-100e_in1k-160": "1: 160 px, the images of eval.transforms have 224 px"
        },
    },
    SOBEL: {
        "": {
            "deepcluster-sobel_resnet50_8xb64-steplr-200e_in1k": "",
            "deepcluster-sobel_resnet18_8xb64-steplr-200e_in1k": "1: resnet18, model.backbone.backbone.depth is 50",
        },
        "model.backbone.backbone.frozen_stages = 4": {
            "deepcluster-sobel_resnet50-mine-nofrz_8xb64-steplr-200e_in1k": (
                "2: nofrz, model.backbone.backbone.frozen_stages is 4"
            )
        },
    },
    SWAV: {
        THREE_GROUPS: {
            "swav_resnet50_8xb32-mcrop-1-1-6-coslr-200e_in1k-224-96": "",
            "swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96": "",
            "swav_resnet50_8xb32-mcrop-1-6-coslr-200e_in1k-224-96": "3: mcrop-1-6, the views",
        },
        "": {
            "swav_resnet50_8xb32-coslr-200e_in1k-224-96": "1: no mcrop, the views are mcrop-2-6 of 224 and 96 px",
            "swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k": "1: in1k without a size, which means 224",
        },
        "data.views.0.transforms.0.size = [96, 96]\n": {
            "swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96": "2: 224 and 96 px, the views have 96 px"
        },
        "data.views.0.transforms.0.size = [96, 80]\n": {"swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96": ""},
        "data.views.1.num_views = 8\n": {"swav_resnet50_8xb32-mcrop-2-8-coslr-200e_in1k-224-96": ""},
    },
    NPID: {
        "": {
            "npid-ensure-neg_resnet50_8xb32-steplr-200e_in1k": "1: ensure-neg, model.ensure_neg is",
            "npid-mine-ensure-neg_resnet50_8xb32-steplr-200e_in1k": "1: ensure-neg, model.ensure_",
        },
        "model.ensure_neg = true": {"npid-ensure-neg_resnet50_8xb32-steplr-200e_in1k": ""},
        'model._delete_ = ["ensure_neg"]': {"npid-ensure-neg_resnet50_8xb32-steplr-200e_in1k": "1: ens"},
    },
    VIT: {
        "": {
            "mocov3_vit-small-p16-nofrz_16xb256-amp-coslr-300e_in1k": (
                "1: nofrz, model.backbone.frozen_patch_embed is true"
            ),
            "mocov3_vit-small-resnext_16xb256-amp-coslr-300e_in1k": "",
            "mocov3_vit-base-p16_16xb256-amp-coslr-300e_in1k": "1: vit-base-p16, model.backbone.arch is small",
            "mocov3_vit_16xb256-amp-coslr-300e_in1k": "",
            "mocov3_deit-small_16xb256-amp-coslr-300e_in1k": "1: deit-small, model.backbone is a VisionTransformer",
        },
        "model.backbone.frozen_patch_embed = false": {"mocov3_vit-small-nofrz_16xb256-amp-coslr-300e_in1k": ""},
        "model.backbone.patch_size = 8": {"mocov3_vit-small-p8_16xb256-amp-coslr-300e_in1k": ""},
        'model.backbone._delete_ = ["patch_size"]': {
            "mocov3_vit-small-p8_16xb256-amp-coslr-300e_in1k": "1: vit-small-p8, model.backbone.patch_size is 16"
        },
        'engine.precision = "fp32"': {"mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k": "2: mixed prec"},
    },
}


@pytest.mark.parametrize(
    ("base", "text", "name", "expected"),
    [
        (base, text, name, expected)
        for base, texts in CASES.items()
        for text, names in texts.items()
        for name, expected in names.items()
    ],
)
def test_a_file_does_what_its_name_says(write, lint, base, text, name, expected):
    found = sorted(lint(write(f"{name}.toml", text or "vars.x = 1", base)))
    expected = [line.replace(": ", ": the name says ", 1) for line in filter(None, expected.split("; "))]
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected


@pytest.mark.parametrize(
    ("base", "name", "reason"),
    [
        (MOCOV2, "mocov2_8xb32", "2 parts joined by '_', not the four of"),
        (LINEAR, "linear_resnet50_8xb32-steplr-100e_in1k", "4 parts joined by '_', not the three of {evaluation}_"),
        (LINEAR, "linear_8xb32_in1k", "the training part '8xb32' does not end with a length"),
    ],
)
def test_a_name_outside_the_convention(write, lint, base, name, reason):
    (found,) = lint(write(f"{name}.toml", "vars.x = 1", base))
    assert found.startswith(f"1: the name does not follow the convention: {reason}")


def test_a_benchmark_of_fine_tuning_states_its_batch_norm_group(write, lint):
    finetune = ROOT / "configs/benchmarks/finetune_4xb64-steplr-20e_in1k-1pct.toml"
    assert lint(write("finetune_4xb64-steplr-20e_in1k.toml", "", finetune)) == []
    (found,) = lint(write("finetune_8xb32-steplr-20e_in1k.toml", "", finetune))
    assert found.startswith("1: the name says 8xb32, eval.finetune.samples_per_gpu is 64 (set at ")


def test_a_benchmark_is_about_evaluation_alone(write, lint):
    write("configs/_base_/default_runtime.toml")
    (found,) = lint(write("configs/benchmarks/linear_8xb32-steplr-100e_in1k.toml", "seed = 3\n", LINEAR))
    assert found == "2: seed does not belong in a benchmark, which sets [eval] alone"


def test_a_value_from_another_file_is_reported_with_its_place(write, lint):
    write("base.toml", "\nglobal_batch = 64", MOCOV2)
    name = write("mocov2_resnet50_8xb32-coslr-200e_in1k.toml", "epochs = 300\nlog.interval = 10", "base.toml")
    assert lint(name) == [
        "1: the name says 8 GPUs x 32 samples = 256, global_batch is 64 (set at base.toml:3)",
        "2: the name says 200 epochs, epochs is 300",
    ]


class TestInheritance:
    def test_four_steps_are_too_many(self, write, lint):
        write("1.toml", "log.interval = 1", MOCOV2)
        write("2.toml", "log.interval = 2", "1.toml")
        assert lint("2.toml") == []
        write("3.toml", "log.interval = 3", "2.toml")
        line = "1: inherits over 4 steps, at most 3 can be followed: 3.toml -> 2.toml -> 1.toml -> "
        assert [found.startswith(line) for found in lint("3.toml")] == [True]
        assert lint(write("alias.toml", "", "2.toml")) == [], "an alias is no step"

    def test_the_longest_chain_counts(self, write, lint):
        """The last block is also reached by a shorter chain, which comes first."""
        write("_base_/d.toml", "log.interval = 1")
        write("_base_/c.toml", "seed = 1", "_base_/d.toml")
        write("_base_/b.toml", "seed = 2", "_base_/c.toml")
        write("_base_/a.toml", "seed = 3", "_base_/b.toml")
        found = lint(write("_base_/x.toml", "seed = 4", "_base_/d.toml", "_base_/a.toml"))
        assert len(found) == 1 and "x.toml -> a.toml -> b.toml -> c.toml -> d.toml" in found[0]

    BASE = 'epochs = 3\n[t]\na = 1\nb = [1, 2.5]\nc = true\nd = "${t.a}"\nl = [{ x = 1, y = 2 }]\nu = { v = 1 }\n'

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("epochs = 3", ["2: epochs = 3 repeats what it inherits from _base_/base.toml:1"]),
            ("epochs = 3.0", ["2: epochs = 3.0 repeats what it inherits from _base_/base.toml:1"]),
            ("epochs = 4", []),
            ("[t]\nb = [1, 2.5]", ["3: t.b = [1, 2.5] repeats what it inherits from _base_/base.toml:4"]),
            ("[t]\nb = [1]", []),
            ("t.a = true\nt.c = 1\nt.b = [true, 2.5]", []),
            ("[t]\nd = '${t.a}'", ['3: t.d = "${t.a}" repeats what it inherits from _base_/base.toml:6']),
            ("[t]\nd = 1", []),
            ("[t.l.0]\nx = 3\ny = 2", ["4: t.l.0.y = 2 repeats what it inherits from _base_/base.toml:7"]),
            (
                "[t]\nl = [{ x = 1, y = 2 }]",
                ["3: t.l = [{ x = 1, y = 2 }] repeats what it inherits from _base_/base.t"],
            ),
            ("[t]\nl = [{ x = true, y = 2 }]", []),
            ("[t]\n_delete_ = true\na = 1\nu = { v = 1 }", []),
            ("[t]\n_delete_ = ['a']\na = 1", []),
            ("[t]\n_delete_ = ['a']\na = 1\nc = true", ["5: t.c = true repeats"]),
            ("[t]\n_delete_ = ['u']\nu = { v = 1 }", []),
            ("[t]\n_delete_ = false\na = 1", ["4: t.a = 1 repeats"]),
            ("[t]\nu = {}", []),
            ("new = 1", []),
        ],
    )
    def test_repetitions(self, write, lint, text, expected):
        write("_base_/base.toml", self.BASE)
        found = lint(write("_base_/x/file.toml", text, "_base_/base.toml"))
        assert [line[: len(said)] for line, said in zip(found, expected, strict=True)] == expected

    def test_a_long_value_is_not_printed(self, write, lint):
        text = f"x = {list(range(30))}"
        write("_base_/base.toml", text)
        assert lint(write("_base_/file.toml", text, "_base_/base.toml")) == [
            "2: x repeats what it inherits from _base_/base.toml:1"
        ]

    @pytest.mark.parametrize(
        ("left", "right", "own", "disagree"),
        [
            ("t.a = 1", "t.a = 2", "", True),
            ("t.a = 1", "t.a = 1.0", "", False),
            ("t.a = 1", "t.a = true", "", True),
            ("t.a = 1", "t.b = 2", "", False),
            ("t.a = [1]", "t.a = [2]", "", True),
            ("t.a = 1", "t.a = 2", "t.a = 3", False),  # this file decides
            ("t.a = [1]", "t.a = [2]", "t.a.0 = 3", False),
            ("t.a = 1", "t.a = 2", "t = { _delete_ = true, b = 1 }", False),
            ("t.a = 1", "t.a = 2", 't._delete_ = ["a"]', False),
            ("t.a = 1", "t = { _delete_ = true, a = 2 }", "", False),  # the later base knows that it replaces
            ("t.a = 1", 't = { _delete_ = ["a"], a = 2 }', "", False),
            ("t.shared = 1", "t.b = 1", "", False),  # one changes what both inherit
            ("t.b = 1", "t.shared = 1", "", False),
            ("t.shared = 1", "t.shared = 2", "", True),
        ],
    )
    def test_bases_that_disagree(self, write, lint, left, right, own, disagree):
        write("_base_/shared.toml", "t.shared = 0")
        write("_base_/left.toml", left, "_base_/shared.toml")
        write("_base_/right.toml", right, "_base_/shared.toml")
        found = lint(write("_base_/file.toml", own, "_base_/left.toml", "_base_/right.toml"))
        assert [
            " at _base_/left.toml:2 and t." in line and line.startswith("1: bases disagree: ") for line in found
        ] == ([True] if disagree else [])

    def test_a_disagreement_that_a_base_resolves_is_not_reported(self, write, lint):
        write("_base_/x.toml", "a = 1\nb = 1")
        write("_base_/y.toml", "a = 2\nb = 1")
        write("_base_/left.toml", "a = 2", "_base_/x.toml")
        assert lint(write("_base_/file.toml", "", "_base_/left.toml", "_base_/y.toml")) == []
        assert len(lint(write("_base_/file.toml", "", "_base_/x.toml", "_base_/y.toml"))) == 1
        assert lint(write("_base_/heir.toml", "c = 1", "_base_/file.toml")) == [], "it is said once"

    def test_a_block_may_delete_keys_of_a_sibling(self, write, lint):
        write("_base_/shared.toml", "t.b = 0")
        write("_base_/x.toml", "t.a = 1")
        assert lint(write("_base_/y.toml", 't = { _delete_ = ["a"], b = 1 }', "_base_/shared.toml")) == []
        assert lint(write("_base_/file.toml", "", "_base_/x.toml", "_base_/y.toml")) == []

    def test_editing_a_siblings_list_is_no_disagreement(self, write, lint):
        write("_base_/x.toml", "a = [1, 2]")
        write("_base_/y.toml", "a.0 = 3")
        assert lint(write("_base_/file.toml", "", "_base_/x.toml", "_base_/y.toml")) == []

    def test_a_base_that_extends_another_may_change_its_values(self, write, lint):
        write("_base_/a.toml", "x = 1\ny = 1")
        write("_base_/b.toml", "x = 2", "_base_/a.toml")
        assert lint(write("_base_/file.toml", "z = 1", "_base_/a.toml", "_base_/b.toml")) == []
        assert lint(write("_base_/file.toml", "z = 1", "_base_/b.toml", "_base_/a.toml")) == []


class TestKinds:
    def test_an_alias_stands_for_a_recipe(self, write, lint):
        assert lint(write("fast.toml", "", MOCOV2)) == lint(write("mocov2.toml", "", MOCOV2)) == []
        assert lint(write("moco.toml", "", MOCOV2)) == [
            "1: moco is an alias of mocov2_resnet50_8xb32-coslr-200e_in1k, which is another method"
        ]
        assert "byol is an alias of mocov2_" in lint(write("byol.toml", "", MOCOV2))[0]
        assert "mocov1 is an alias of mocov2_" in lint(write("mocov1.toml", "", MOCOV2))[0]
        alias = ROOT / "configs/mocov2.toml"
        assert lint(write("x.toml", "", alias)) == [f"1: an alias stands for a recipe, and {alias} is an alias"]
        assert (
            lint(
                write(
                    "relative_loc.toml", "", RECIPES / "relative_loc/relative-loc_resnet50_8xb64-steplr-70e_in1k.toml"
                )
            )
            == []
        )

    @pytest.mark.parametrize(
        ("alias", "missing"),
        [
            ("barlowtwins_accum8", ""),
            ("barlowtwins-accum8-100e", ""),
            ("barlowtwins_8xb32", ""),
            ("barlowtwins_accum4", "accum4"),
            ("barlowtwins_resnet18-100e-sobel", "resnet18, sobel"),
        ],
    )
    def test_an_alias_may_say_more_than_the_method(self, write, lint, alias, missing):
        target = RECIPES / "barlowtwins/barlowtwins_resnet50_8xb32-accum8-coslr-100e_in1k.toml"
        expected = [f"1: {alias} says {missing}, and its recipe {target.stem} does not"] if missing else []
        assert lint(write(f"{alias}.toml", "", target)) == expected

    def test_a_file_is_not_called_like_another_method(self, write, lint):
        assert lint(write("mine.toml", "seed = 1", MOCOV2)) == []
        assert lint(write("moco.toml", "seed = 1", MOCOV2)) == []
        assert lint(write("byol_or_not.toml", "seed = 1", MOCOV2)) == []
        assert len(lint(write("byol_accum8.toml", "seed = 1", MOCOV2))) == 1
        (found,) = lint(write("byol.toml", "seed = 1", MOCOV2))
        assert found.startswith(f"1: the name says BYOL, model.type is MoCo (set at {BLOCKS / 'models/mocov2.toml'}:")

    def test_a_recipe_is_known_by_its_folder_or_by_a_batch_in_its_name(self, write, lint):
        assert lint(write("selfsup/mine.toml", "seed = 1", MOCOV2)) == [], "a folder of somebody's who calls it so"
        write("_base_/runtime.toml", "")
        assert "convention" in lint(write("selfsup/mine.toml", "seed = 1", MOCOV2))[0]
        assert "convention" in lint(write("selfsup/moco/mine.toml", "seed = 1", MOCOV2))[0]
        assert "convention" in lint(write("mine-8xb32.toml", "seed = 1", MOCOV2))[0]
        assert lint(write("mine_with-3xbits.toml", "seed = 1", MOCOV2)) == []

    def test_a_building_block_may_have_any_name_and_content(self, write, lint):
        assert lint(write("_base_/models/byol_resnet50_8xb32-coslr-1e_in1k.toml", "model.a = 1\nepochs = 3")) == []


class TestCommand:
    def test_files_and_folders(self, write, capsys):
        write("a/b/1.toml", "epochs = 200", MOCOV2)
        write("a/2.toml", "epochs = 200", MOCOV2)
        write("a/notes.txt", "no config")
        assert main(["config", "lint", "a", "a/2.toml"]) == 1
        out, err = capsys.readouterr()
        assert [line.partition(": ")[0] for line in out.splitlines()] == ["a/2.toml:2", "a/b/1.toml:2"]
        assert err == "2 files checked\n"

    def test_invalid_files_are_reported_and_the_others_checked(self, write, capsys):
        for name, text in (("1", "seed = 1\nepocs = 3"), ("2", "epochs = 200"), ("3", "x = "), ("4", "")):
            write(f"{name}.toml", text, MOCOV2)
        write("_base_/5.toml", "", "3.toml")
        assert main(["config", "lint", "."]) == 2
        out, err = capsys.readouterr()
        assert [line.partition(": ")[0] for line in out.splitlines()] == ["2.toml:2"]
        errors = err.splitlines()
        assert [line.partition(": ")[2].partition(": ")[0] for line in errors[:-1]] == [
            "1.toml:3",
            "3.toml:2",
            "3.toml:2",
        ]
        assert all(line.startswith("error: ") for line in errors[:-1]) and errors[-1] == "5 files checked"

    def test_nothing_to_check(self, tmp_path, capsys):
        assert main(["config", "lint", str(tmp_path)]) == 2
        assert capsys.readouterr().err == f"error: {tmp_path}: there is no .toml file in this folder\n"
        assert main(["config", "lint", str(tmp_path / "gone.toml")]) == 2
        assert "gone.toml: No such file or directory" in capsys.readouterr().err

    def test_help_names_the_convention(self, capsys):
        with pytest.raises(SystemExit):
            main(["config", "lint", "--help"])
        assert "sslrun config lint convention" in capsys.readouterr().out

    def test_a_very_long_chain(self, write, capsys):
        write("0.toml", "")
        for step in range(1, 1200):
            write(f"{step}.toml", "", f"{step - 1}.toml")
        assert main(["config", "lint", "1199.toml"]) == 2
        assert capsys.readouterr().err == "error: 1199.toml: inherits over more than 200 files\n1 file checked\n"


scalars = (
    st.integers()
    | st.floats(allow_nan=False)
    | st.booleans()
    | st.text(max_size=3)
    | st.sampled_from(["MoCo", "ResNet"])
)
keys = st.sampled_from(
    ["type", "backbone", "depth", "views", "size", "num_views", "transforms", "0", "policy", "_delete_"]
)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=4), max_leaves=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["model", "data", "lr", "optimizer", "engine", "epochs", "vars"]), values))
def test_any_content_gives_findings_or_one_line(write, capsys, content):
    write(
        "swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k.toml", 'custom_imports = ["my"]\n' + tomli_w.dumps(content), SWAV
    )
    code = main(["config", "lint", "."])
    out, err = capsys.readouterr()
    assert code == (2 if "error: " in err else 1 if out else 0)
    assert len(err.splitlines()) == (2 if code == 2 else 1)
