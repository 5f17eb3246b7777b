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
from sslrun.importer.old import Effect
from sslrun.importer.reader import read
from sslrun.recipe import Recipe

ROOT = Path(__file__).parents[1]
OLD = Path(__file__).with_name("old_configs")
V0, V1 = sorted((OLD / "v0").glob("*.py")), sorted((OLD / "v1").glob("*.py"))
SHIPPED = {path.stem: path for path in (ROOT / "configs/selfsup").rglob("*.toml")}
METHODS = {
    "barlowtwins", "byol", "deepcluster", "deepcluster-sobel", "densecl", "mocov1", "mocov2", "mocov3", "npid", "odc",
    "relative-loc", "rotation-pred", "simclr", "simsiam", "swav",
}  # fmt: skip


def label(path):
    return f"{path.parent.name}-{path.stem.partition('_in1k')[0]}"


def findings(imported, effect):
    return [finding.line() for finding in imported.report.findings(effect)]


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
    # Solarization with probability 0 is not written in what ships, which names norms that hold anyway.
    "mocov3": {
        "data.views.0.transforms.4": ({"type": "Solarization", "p": 0.0}, None),
        "model.neck.norm_cfg": (None, {"type": "SyncBN"}),
        "model.head.predictor.norm_cfg": (None, {"type": "SyncBN"}),
    },
    "v1-odc": {"model.neck.norm_cfg": (None, {"type": "SyncBN", "momentum": 0.001, "affine": False})},
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


class TestRecipes:
    """Every method, in both forms, becomes the recipe that ships."""

    def test_there_is_one_of_each(self):
        assert {path.stem.partition("_")[0] for path in V0} - {"npid-ensure-neg"} == METHODS
        assert {path.stem.partition("_")[0] for path in V1} == METHODS

    @pytest.mark.parametrize("path", [*V0, *V1], ids=label)
    def test_equals_what_ships(self, converted, path):
        expected = [pairs for pattern, pairs in DIFFERENCES.items() if re.search(pattern, label(path))]
        found = differences(load(converted(path)), load(SHIPPED[path.stem]))
        pairs = {show(old.key): tuple(plain(side.node) if side.node else None for side in (old, new))
                 for old, new, _ in found if old.key[-1] != "match"}  # fmt: skip
        assert pairs == {key: pair for pairs in expected for key, pair in pairs.items()}

    @pytest.mark.parametrize("path", [*V0, *V1], ids=label)
    def test_says_what_it_could_not_convert(self, path):
        imported = import_config(path)
        lines = findings(imported, Effect.LOST) + findings(imported, Effect.CHANGED)
        assert [line.split(": ")[1] for line in lines] == REPORTED.get(label(path), [])
        for line in findings(imported, Effect.LEFT):
            file, number = line.split(":")[:2]
            key = line.split(": ")[1].rpartition(".")[2]
            text = Path(file).read_text().splitlines()[int(number) - 1]
            assert key in text or "dict(" in text, "the line is that of the key"

    def test_reads_like_those_that_ship(self, converted):
        """Whole files, as a reader sees them."""
        text = converted(OLD / "v0/mocov2_resnet50_8xb32-coslr-200e_in1k.py").read_text()
        body = text[text.index("\n\n") + 2 :]
        assert body.startswith("epochs = 200\nglobal_batch = 256\n\n[vars]\nmean = [0.485, 0.456, 0.406]\n")
        assert '[model.backbone]\ntype = "ResNet"\ndepth = 50\nin_channels = 3\nout_indices = [4]\n' in body
        assert (
            "[[data.views]]\n"
            "num_views = 2\n"
            "transforms = [\n"
            '  { type = "RandomResizedCrop", size = 224, scale = [0.2, 1.0] },\n'
            '  { type = "ColorJitter", p = 0.8, brightness = 0.4, contrast = 0.4, saturation = 0.4, hue = 0.1 },\n'
            '  { type = "RandomGrayscale", p = 0.2 },\n'
            '  { type = "GaussianBlur", sigma_min = 0.1, sigma_max = 2.0, p = 0.5 },\n'
            '  { type = "RandomHorizontalFlip", p = 0.5 },\n'
            '  { type = "Normalize", mean = "${vars.mean}", std = "${vars.std}" },\n'
            "]\n"
        ) in body
        head = text[: text.index("\n\n")].splitlines()
        assert head[0].startswith("# Made by `sslrun config import` from ")
        assert all(line.startswith("#") for line in head) and "runtime.py:4: dist_params: " in "\n".join(head)
        assert max(map(len, body.splitlines())) <= 120


class TestBuild:
    """Converted recipes build the networks and parameter groups of those that ship."""

    @pytest.mark.parametrize("path", [*V0, *V1], ids=label)
    def test_networks_and_parameter_groups(self, converted, path):
        networks, groups = [], []
        for file in (converted(path), SHIPPED[path.stem]):
            recipe = built(load(file), Recipe)
            networks.append(str(recipe.model))
            made = recipe.optimizer.create(recipe.model.named_parameters()).param_groups
            groups.append({json.dumps(options(group), sort_keys=True): sorted(names(group)) for group in made})
        assert networks[0] == networks[1]
        assert groups[0] == groups[1]

    def test_the_published_pattern_of_norms(self, tmp_path):
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
        chosen = {name for group in groups if not group["weight_decay"] for name in names(group)}
        assert chosen == expected & trained and {"neck.mlp.1.weight", "head.predictor.mlp.1.bias"} <= chosen

    @pytest.mark.nightly
    @pytest.mark.parametrize("path", [*V0, *V1], ids=label)
    def test_dry_run(self, converted, capsys, path):
        assert main([str(converted(path)), "--dry-run"]) == 0
        assert capsys.readouterr().out.startswith(path.stem)

    def test_a_dry_run_of_one(self, converted, capsys):
        """The others: make test-nightly."""
        path = OLD / "v1/swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96.py"
        assert main([str(converted(path)), "--set", "engine.micro_batch=32", "--dry-run"]) == 0
        assert "2 of 224x224 px + 6 of 96x96 px" in capsys.readouterr().out


def built(config, annotation, key=""):
    """What a config makes, without memory for its parameters where the method lets that be (NPID draws a number)."""
    with torch.device("cpu" if config.values["model"]["type"] == "NPID" else "meta"):
        return config.build(annotation, key)


def options(group):
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def names(group):
    return group["param_names"]


CONVERTED = {
    "v0": {
        "model", "data", "optimizer", "optimizer_config", "lr_config", "runner", "checkpoint_config", "log_config",
        "custom_hooks", "workflow",
    },
    "v1": {
        "model", "train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg", "default_hooks", "custom_hooks",
        "visualizer", "auto_scale_lr",
    },
}  # fmt: skip
# Values that may change without a word: what the loader hands on, what another key says too.
KNOWN_SILENT = (
    "priority", "custom_hooks.0.batch_size", "custom_hooks.0.interval", "train.prefetch", "pseudo_label_keys",
    "algorithm_keys", "meta_keys", "visualizer.type", "visualizer.name", "base_batch_size", "with_last_bn_affine",
)  # fmt: skip


class TestNothingIsSilent:
    """Change any value, add any key: the recipe or the report changes, or the whole table was reported."""

    @staticmethod
    def leaves(value, path=()):
        if isinstance(value, dict | list) and value:
            for part, below in value.items() if isinstance(value, dict) else enumerate(value):
                yield from TestNothingIsSilent.leaves(below, (*path, part))
        else:
            yield path, value

    @staticmethod
    def tables(value, path=()):
        if isinstance(value, dict) and path:
            yield path
        for part, below in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(below, dict | list):
                yield from TestNothingIsSilent.tables(below, (*path, part))

    @staticmethod
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
    def test_change(self, tmp_path, path):
        values = {key: value for key, value in plain(read(path).root).items() if key in CONVERTED[path.parent.name]}
        old = tmp_path / path.name

        def result(table):
            text = "".join(f"{key} = {value!r}\n" for key, value in table.items())
            old.write_text(text)
            try:
                imported = import_config(old)
            except UsageError as error:
                return str(error), []
            reported = imported.report.findings(Effect.LEFT) + imported.report.findings(Effect.LOST)
            return imported.text, [finding.line().split(": ")[1] for finding in reported]

        before, reported = result(values)
        silent = []
        cases = [(place, self.changed(value)) for place, value in self.leaves(values)]
        for place, value in [*cases, *(((*table, "zzz"), 1) for table in self.tables(values))]:
            table = copy.deepcopy(values)
            holder = table
            for part in place[:-1]:
                holder = holder[part]
            holder[place[-1]] = value
            name = ".".join(map(str, place))
            if result(table)[0] == before and not any(f"{name}.".startswith(f"{key}.") for key in reported):
                silent.append(name)
        assert [name for name in silent if not any(part in name for part in KNOWN_SILENT)] == []


class TestCommand:
    """`sslrun config import OLD.py -o NEW.toml`."""

    def run(self, capsys, *words):
        code = main(["config", "import", *map(str, words)])
        return code, *capsys.readouterr()

    def test_writes_a_recipe_that_loads(self, capsys, tmp_path):
        old, new = OLD / "v0/odc_resnet50_8xb64-steplr-440e_in1k.py", tmp_path / "odc.toml"
        code, out, err = self.run(capsys, old, "-o", new)
        assert code == 0 and out == f"{new}: 2 not converted, 0 changed, 12 left out\n"
        assert len(err.splitlines()) == 14
        assert f"{old.relative_to(Path.cwd())}:3: data.replace: not converted: every epoch sees" in err
        assert load(new).values["model"]["type"] == "ODC"
        assert [path.name for path in tmp_path.iterdir()] == ["odc.toml"], "nothing else is left"
        comments = [line[4:] for line in new.read_text().splitlines() if line.startswith("#   ")]
        assert sorted(
            re.sub(r": (not converted|changed|left out): ", ": ", line) for line in err.splitlines()
        ) == sorted(comments)

    def test_replaces_nothing_unasked(self, capsys, tmp_path):
        old, new = OLD / "v0/byol_resnet50_16xb256-coslr-200e_in1k.py", tmp_path / "byol.toml"
        new.write_text("mine")
        code, out, err = self.run(capsys, old, "-o", new)
        assert (code, out, err) == (2, "", f"error: {new} exists; --force replaces it\n") and new.read_text() == "mine"
        assert self.run(capsys, old, "-o", new, "--force")[0] == 0 and new.read_text() != "mine"
        copied = tmp_path / "copied.py"
        copied.write_text("x = 1")
        code, _, err = self.run(capsys, copied, "-o", copied, "--force")
        assert code == 2 and "is what is to be imported" in err and copied.read_text() == "x = 1"

    def test_writes_nothing_where_it_cannot_read(self, capsys, tmp_path):
        old, new = tmp_path / "old.py", tmp_path / "new.toml"
        old.write_text("x = 'a' * 10**9")
        code, out, err = self.run(capsys, old, "-o", new)
        assert (code, out) == (2, "") and err.startswith(f"error: {old}:1: ") and len(err.splitlines()) == 1
        assert not new.exists()
        new.write_text("mine")
        assert self.run(capsys, old, "-o", new, "--force")[0] == 2 and new.read_text() == "mine"

    @pytest.mark.parametrize("new", ["missing/new.toml", "."])
    def test_places_that_cannot_be_written(self, capsys, tmp_path, monkeypatch, new):
        monkeypatch.chdir(tmp_path)
        Path("old.py").write_text("model = dict(type='MoCo')")
        code, out, err = self.run(capsys, "old.py", "-o", new, "--force")
        assert code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith(f"error: {new}: ")

    def test_number_of_gpus(self, capsys, tmp_path):
        old = OLD / "v0/byol_resnet50_16xb256-coslr-200e_in1k.py"
        assert self.run(capsys, old, "-o", tmp_path / "a.toml", "--gpus", 4)[0] == 0
        assert load(tmp_path / "a.toml").values["global_batch"] == 4 * 256
        assert self.run(capsys, old, "-o", tmp_path / "b.toml", "--gpus", 0)[0] == 2

    def test_an_unknown_method_exits_with_1(self, capsys, tmp_path):
        """Exit code 1, and the method is named: the rest is converted all the same."""
        old, new = OLD / "v0/mocov2_resnet50_8xb32-coslr-200e_in1k.py", tmp_path / "mae.toml"
        other = tmp_path / "mae_1xb2.py"
        other.write_text(f"_base_ = {str(old)!r}\nmodel = dict(_delete_=True, type='mmselfsup.models.MAE')")
        code, out, err = self.run(capsys, other, "-o", new)
        assert code == 1 and out.startswith(f"{new}: 2 not converted, ")
        assert err.splitlines()[-1] == f"error: {new} cannot be run: no model: there is no method MAE here"
        assert tomllib.loads(new.read_text())["epochs"] == 200

    def test_odd_names_stay_on_one_line(self, capsys, tmp_path):
        folder = tmp_path / "a\nb\x1b[31m"
        folder.mkdir()
        old, new = folder / "moco_1xb2.py", tmp_path / "new.toml"
        old.write_text("model = dict(type='No\\nSuch\\x1b')\n")
        code, _, err = self.run(capsys, old, "-o", new)
        assert code == 1 and "\x1b" not in err and tomllib.loads(new.read_text()) == {}
        assert all(line.startswith((str(tmp_path), "error: ")) for line in err.splitlines())

    def test_needs_no_torch(self, tmp_path):
        words = ["config", "import", str(OLD / "v1/swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96.py"), "-o"]
        code = "import sys; from sslrun.cli import main\nassert main(sys.argv[1:]) == 0\n"
        code += "assert not {'torch', 'numpy', 'nvidia.dali'} & set(sys.modules), 'heavy imports'"
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}/engine"}
        command = [sys.executable, "-c", code, *words, str(tmp_path / "new.toml")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
