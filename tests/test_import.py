"""`sslrun config import`: old configs are read without being executed, and become recipes that say the same.

The inputs in old_configs/ are written for these tests, in the forms that MMSelfSup's own have: v0 is 0.x, v1 is 1.x.
"""

import copy
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from sslrun.cli import main
from sslrun.config import load
from sslrun.config.diff import differences
from sslrun.config.node import plain, show
from sslrun.errors import UsageError
from sslrun.importer import import_config
from sslrun.importer.notes import LEFT
from sslrun.importer.old import Effect
from sslrun.importer.reader import read
from sslrun.recipe import Recipe

ROOT = Path(__file__).parents[1]
OLD = Path(__file__).with_name("old_configs")
V0, V1 = sorted((OLD / "v0").glob("*.py")), sorted((OLD / "v1").glob("*.py"))
SHIPPED = {path.stem: path for path in (ROOT / "configs/selfsup").rglob("*.toml")}


def label(path):
    return f"{path.parent.name}-{path.stem.partition('_in1k')[0]}"


# Where a converted recipe differs from the one that ships: form and file -> key -> (converted, shipped), and why.
# Not compared here: how rules of optimizer.paramwise select parameters (TestBuild compares what they select).
DIFFERENCES = {
    # The old frameworks keep an incomplete last batch by default.
    "v0-(barlow|byol|deepcluster|mocov3|odc)": {"data.drop_last": (False, True)},
    # Worker threads are a machine's business; what ships has one number for a data set.
    "deepcluster|odc|v1-relative": {"data.workers_per_gpu": (4, 8)},
    "v1-(densecl|mocov[12]|npid|simclr|simsiam|swav)": {"data.workers_per_gpu": (8, 4)},
    "v1-rotation": {"data.workers_per_gpu": (2, 4)},
    # 1.x begins the cosine after the warm-up, 0.x with the run; what ships does as 0.x, but MoCo v3 as its paper.
    "v1-(barlow|byol|simclr)": {"lr.after_warmup": (True, False)},
    "v0-mocov3": {"lr.after_warmup": (False, True)},
    # Every 50 backward passes there are every 4 steps.
    "accum16": {"log.interval": (4, 50)},
    # Solarization with probability 0 is not written in what ships.
    "mocov3": {"data.views.0.transforms.4": ({"type": "Solarization", "p": 0.0}, None)},
    # 1.x squeezes images to a square, 0.x and what ships keep their proportions; the decay is the same.
    "v1-relative": {
        "data.views.0.transforms.0.transforms.0.size": ([292, 292], 292),
        "optimizer.paramwise.0.weight_decay": (None, 5e-4),
        "optimizer.paramwise.0.weight_decay_mult": (5.0, None),
    },
}

# What is reported as not converted or changed, by the end of the line; all else of these configurations is converted.
REPORTED = {
    "v0-barlowtwins_resnet50_8xb256-coslr-300e": ["model.neck.init_cfg"],
    "v0-interclr_resnet50_8xb32-coslr-200e": ["data.replace"],
    "v0-odc_resnet50_8xb64-steplr-440e": ["data.replace", "clustering"],
    "v1-barlowtwins_resnet50_8xb256-coslr-300e": ["model.neck.init_cfg"],
    "v1-byol_resnet50_8xb32-accum16-coslr-200e": ["model"],
    "v1-odc_resnet50_8xb64-steplr-440e": ["train_dataloader.sampler.replace"],
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The recipes made of all old configs, by their labels."""
    folder = tmp_path_factory.mktemp("converted")

    def convert(path):
        new = folder / path.parent.name / f"{path.stem}.toml"
        if not new.exists():
            new.parent.mkdir(exist_ok=True)
            new.write_text(import_config(path).text, encoding="utf-8")
        return new

    return convert


@pytest.mark.parametrize("path", [*V0, *V1], ids=label)
def test_equals_what_ships(converted, path):
    """As values, and as the networks and parameter groups that it builds."""
    expected = [pairs for pattern, pairs in DIFFERENCES.items() if re.search(pattern, label(path))]
    new, shipped = load(converted(path)), load(SHIPPED[path.stem])
    pairs = {show(old.key): tuple(plain(side.node) if side.node else None for side in (old, new))
             for old, new, _ in differences(new, shipped) if old.key[-1] != "match"}  # fmt: skip
    assert pairs == {key: pair for pairs in expected for key, pair in pairs.items()}
    networks, groups = [], []
    for config in (new, shipped):
        recipe = built(config, Recipe)
        networks.append(str(recipe.model))
        made = recipe.optimizer.create(recipe.model.named_parameters()).param_groups
        named = [(sorted(group.pop("param_names")), group | {"params": 0}) for group in made]
        groups.append({json.dumps(options, sort_keys=True): names for names, options in named})
    assert networks[0] == networks[1] and groups[0] == groups[1]


@pytest.mark.parametrize("path", [*V0, *V1], ids=label)
def test_says_what_it_could_not_convert(path):
    report = import_config(path).report
    lost = [finding.line() for effect in (Effect.LOST, Effect.CHANGED) for finding in report.findings(effect)]
    assert [line.split(": ")[1] for line in lost] == REPORTED.get(label(path), [])
    for line in (finding.line() for finding in report.findings(Effect.LEFT)):
        file, number = line.split(":")[:2]
        text = Path(file).read_text().splitlines()[int(number) - 1]
        assert line.split(": ")[1].rpartition(".")[2] in text or "dict(" in text, "the line is that of the key"


def test_reads_like_those_that_ship(converted):
    """Whole files, as a reader sees them."""
    text = converted(OLD / "v0/mocov2_resnet50_8xb32-coslr-200e_in1k.py").read_text()
    head, body = text.split("\n\n", 1)
    assert head.startswith("# Made by `sslrun config import` from ") and "runtime.py:4: dist_params: " in head
    assert all(line.startswith("#") for line in head.splitlines()) and max(map(len, body.splitlines())) <= 120
    assert body.startswith("epochs = 200\nglobal_batch = 256\n\n[vars]\nmean = [0.485, 0.456, 0.406]\n")
    assert '[model.backbone]\ntype = "ResNet"\ndepth = 50\nin_channels = 3\nout_indices = [4]\n' in body
    assert (
        "[[data.views]]\nnum_views = 2\ntransforms = [\n"
        '  { type = "RandomResizedCrop", size = 224, scale = [0.2, 1.0] },\n'
        '  { type = "ColorJitter", p = 0.8, brightness = 0.4, contrast = 0.4, saturation = 0.4, hue = 0.1 },\n'
    ) in body
    assert '  { type = "Normalize", mean = "${vars.mean}", std = "${vars.std}" },\n]\n' in body


def test_the_published_pattern_of_norms(tmp_path):
    """OpenSelfSup's pattern means all norms but those of shortcuts, of which a projector's have no name here."""
    rule = r"**{'(bn|gn)(\\d+)?.(weight|bias)': dict(weight_decay=0.)}"
    old, new = tmp_path / "byol_8xb32.py", tmp_path / "byol.toml"
    base = str(OLD / "v0/byol_resnet50_16xb256-coslr-200e_in1k.py")
    old.write_text(f"_base_ = {base!r}\noptimizer = dict(paramwise_options=dict(_delete_=True, {rule}))")
    new.write_text(import_config(old).text)
    recipe = built(load(new), Recipe)
    groups = recipe.optimizer.create(recipe.model.named_parameters()).param_groups
    norms = {name for name, part in recipe.model.named_modules() if type(part).__name__ == "GroupBatchNorm"}
    expected = {f"{name}.{part}" for name in norms if "downsample" not in name for part in ("weight", "bias")}
    trained = {name for name, parameter in recipe.model.named_parameters() if parameter.requires_grad}
    chosen = {name for group in groups if not group["weight_decay"] for name in group["param_names"]}
    assert chosen == expected & trained and {"neck.mlp.1.weight", "head.predictor.mlp.1.bias"} <= chosen


SWAV = OLD / "v1/swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96.py"


@pytest.mark.parametrize("path", [SWAV, *(pytest.param(path, marks=pytest.mark.nightly) for path in [*V0, *V1])])
def test_dry_run(converted, capsys, path):
    smaller = ["--set", "engine.micro_batch=32"] if path == SWAV else []
    assert main([str(converted(path)), *smaller, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(path.stem) and ("2 of 224x224 px + 6 of 96x96 px" in out) == ("swav" in path.stem)


def built(config, annotation, key=""):
    """What a config makes, without memory for its parameters where the method lets that be (NPID draws a number)."""
    with torch.device("cpu" if config.values["model"]["type"] == "NPID" else "meta"):
        return config.build(annotation, key)


# Values that may change without a word: what the loader hands on, what another key says too.
KNOWN_SILENT = (
    "priority", "custom_hooks.0.batch_size", "custom_hooks.0.interval", "train.prefetch", "pseudo_label_keys",
    "algorithm_keys", "meta_keys", "visualizer.type", "visualizer.name", "base_batch_size", "with_last_bn_affine",
)  # fmt: skip


def leaves(value, path=()):
    if isinstance(value, dict | list) and value:
        for part, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(below, (*path, part))
    else:
        yield path, value


def changed(value):
    match value:
        case bool():
            return not value
        case int() | float():
            return 2 * value + 3
    return "zzz" if isinstance(value, str) or value is None else ["zzz"] if isinstance(value, list) else {"zzz": 1}


@pytest.mark.parametrize(
    "path",
    [
        OLD / "v0/relative-loc_resnet50_8xb64-steplr-70e_in1k.py",
        OLD / "v1/mocov2_resnet50_8xb32-coslr-200e_in1k.py",
        *(pytest.param(path, marks=pytest.mark.nightly) for path in [*V0, *V1]),
    ],
    ids=label,
)
def test_nothing_is_silent(tmp_path, path):
    """Change any value, add any key: the recipe or the report changes, or the whole table was reported."""
    root, unread = read(path)
    keys = unread | {"data", "train_dataloader", "data_preprocessor"}  # read of the bases
    values = {key: value for key, value in plain(root).items() if key in keys and ("top", key) not in LEFT}
    old = tmp_path / path.name

    def result(table):
        old.write_text("".join(f"{key} = {value!r}\n" for key, value in table.items()))
        try:
            imported = import_config(old)
        except UsageError as error:
            return str(error), []
        reported = imported.report.findings(Effect.LEFT) + imported.report.findings(Effect.LOST)
        return imported.text, [finding.line().split(": ")[1] for finding in reported]

    before, reported = result(values)
    silent = []
    tables = {place[:end] for place, _ in leaves(values) for end in range(1, len(place)) if isinstance(place[end], str)}
    cases = [(place, changed(value)) for place, value in leaves(values)]
    for place, value in [*cases, *(((*table, "zzz"), 1) for table in sorted(tables, key=str))]:
        table = copy.deepcopy(values)
        holder = table
        for part in place[:-1]:
            holder = holder[part]
        holder[place[-1]] = value
        name = ".".join(map(str, place))
        if result(table)[0] == before and not any(f"{name}.".startswith(f"{key}.") for key in reported):
            silent.append(name)
    assert [name for name in silent if not any(part in name for part in KNOWN_SILENT)] == []


def run(capsys, *words):
    code = main(["config", "import", *map(str, words)])
    return code, *capsys.readouterr()


BYOL, ODC = OLD / "v0/byol_resnet50_16xb256-coslr-200e_in1k.py", OLD / "v0/odc_resnet50_8xb64-steplr-440e_in1k.py"


class TestCommand:
    """`sslrun config import OLD.py -o NEW.toml`."""

    def test_writes_a_recipe_that_loads(self, capsys, tmp_path):
        new = tmp_path / "odc.toml"
        code, out, err = run(capsys, ODC, "-o", new)
        assert code == 0 and out == f"{new}: 2 not converted, 0 changed, 12 left out\n"
        assert f"{ODC.relative_to(Path.cwd())}:3: data.replace: not converted: every epoch sees" in err
        assert load(new).values["model"]["type"] == "ODC"
        assert [path.name for path in tmp_path.iterdir()] == ["odc.toml"], "nothing else is left"
        comments = [line[4:] for line in new.read_text().splitlines() if line.startswith("#   ")]
        effects = re.compile(": (not converted|changed|left out): ")
        assert sorted(effects.sub(": ", line) for line in err.splitlines()) == sorted(comments)

    def test_replaces_nothing_unasked(self, capsys, tmp_path):
        new = tmp_path / "byol.toml"
        new.write_text("mine")
        code, out, err = run(capsys, BYOL, "-o", new)
        assert (code, out, err) == (2, "", f"error: {new} exists; --force replaces it\n") and new.read_text() == "mine"
        assert run(capsys, BYOL, "-o", new, "--force")[0] == 0 and new.read_text() != "mine"

    @pytest.mark.parametrize(
        ("new", "text", "line"),
        [
            ("old.py", "x = 1", "error: old.py is what is to be imported"),
            ("missing/new.toml", "x = 1", "error: missing/new.toml: "),
            (".", "x = 1", "error: .: "),
            ("new.toml", "x = 'a' * 10**9", "error: old.py:1: "),
        ],
    )
    def test_writes_nothing_where_it_cannot(self, capsys, write, new, text, line):
        old, kept = write("old.py", text), write("new.toml", "mine")
        code, out, err = run(capsys, "old.py", "-o", new, "--force")
        assert (code, out) == (2, "") and err.startswith(line) and len(err.splitlines()) == 1
        assert (old.read_text(), kept.read_text()) == (text, "mine")

    def test_number_of_gpus(self, capsys, tmp_path):
        assert run(capsys, BYOL, "-o", tmp_path / "a.toml", "--gpus", 4)[0] == 0
        assert load(tmp_path / "a.toml").values["global_batch"] == 4 * 256
        assert run(capsys, BYOL, "-o", tmp_path / "b.toml", "--gpus", 0)[0] == 2

    def test_an_unknown_method_exits_with_1(self, capsys, tmp_path):
        """Exit code 1, and the method is named: the rest is converted all the same."""
        old, new = tmp_path / "saim_1xb2.py", tmp_path / "saim.toml"
        old.write_text(f"_base_ = {str(BYOL)!r}\nmodel = dict(_delete_=True, type='mmselfsup.models.SAIM')")
        code, out, err = run(capsys, old, "-o", new)
        assert code == 1 and out.startswith(f"{new}: ") and tomllib.loads(new.read_text())["epochs"] == 200
        assert err.splitlines()[-1] == f"error: {new} cannot be run: no model: there is no method SAIM here"

    def test_odd_names_stay_on_one_line(self, capsys, tmp_path):
        folder = tmp_path / "a\nb\x1b[31m"
        folder.mkdir()
        old, new = folder / "moco_1xb2.py", tmp_path / "new.toml"
        old.write_text("model = dict(type='No\\nSuch\\x1b" + "X" * 9999 + "')\n")
        code, _, err = run(capsys, old, "-o", new)
        assert code == 1 and "\x1b" not in err and tomllib.loads(new.read_text()) == {}
        assert all(line.startswith((str(tmp_path), "error: ")) and len(line) < 2000 for line in err.splitlines())

    def test_needs_no_torch(self, tmp_path):
        code = "import sys; from sslrun.cli import main\nassert main(sys.argv[1:]) == 0\n"
        code += "assert not {'torch', 'numpy', 'nvidia.dali'} & set(sys.modules), 'heavy imports'"
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}/engine"}
        command = [sys.executable, "-c", code, "config", "import", str(SWAV), "-o", str(tmp_path / "new.toml")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
