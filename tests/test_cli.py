"""The command line: every user error is one line and exit code 2, no file is lost, and config verbs need no torch."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli

import small_run
from small_run import call
from sslrun.cli import main
from sslrun.runtime import checkpoint

MOCOV2 = str(small_run.ROOT / "configs/mocov2.toml")


def refused(capsys, *words: object) -> str:
    """The error line of a command that exits with code 2."""
    code, out, err = call(capsys, *words)
    assert code == 2, (code, err)
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in err, err
    assert not out
    return lines[0]


@pytest.fixture
def recipe(tmp_path, images):
    return small_run.write_recipe(tmp_path, images, steps=4)


def test_config_print_parses_back(capsys, tmp_path):
    code, out, _ = call(capsys, "config", "print", MOCOV2, "--set", "epochs=800")
    assert code == 0 and tomli.loads(out)["epochs"] == 800
    again = tmp_path / "again.toml"
    again.write_text(out)
    assert call(capsys, "config", "print", again)[1] == out


def test_config_explain_without_a_key_explains_all_keys(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = call(capsys, "config", "explain", MOCOV2)
    assert code == 0 and out == call(capsys, "config", "explain", MOCOV2, "--all")[1]
    assert "\n[model.backbone]\n" in out and f"\nseed = 0{'default of the code':>72}\n" in out
    code, part, _ = call(capsys, "config", "explain", MOCOV2, "model.backbone", "--all")
    assert code == 0 and part.startswith("[model.backbone]\n") and part.rstrip() in out


def test_config_explain_lists_the_places_that_set_a_key(capsys):
    code, out, _ = call(capsys, "config", "explain", MOCOV2, "epochs", "--set", "epochs=800")
    assert code == 0
    assert "sgd_coslr-200e_in1k.toml:" in out and out.rstrip().splitlines()[-1].strip().startswith("--set epochs=800")


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["eval", "--help"],
        ["export", "--help"],
        ["embed", "--help"],
        ["similar", "--help"],
        ["list", "monitors"],
        ["config", "print", MOCOV2],
        ["config", "explain", MOCOV2, "model"],
        ["config", "explain", MOCOV2, "--all"],
        ["config", "diff", MOCOV2, "--set", "epochs=800"],
        ["config", "schema", "--editor"],
        ["config", "lint", str(small_run.ROOT / "configs")],
        ["config", "lint", "convention"],
        ["list", "transforms", "ColorJitter"],
        ["list", "--json"],
    ],
)
def test_config_verbs_import_no_torch(words):
    code = "import sys; from sslrun.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'numpy', 'nvidia.dali'} & set(sys.modules), 'heavy imports'"
    environment = {**os.environ, "PYTHONPATH": f"{small_run.ROOT}/engine"}
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_transforms_import_no_torch():
    code = "import sys, sslrun.data.transforms; assert not {'torch', 'nvidia.dali'} & set(sys.modules), 'heavy imports'"
    environment = {**os.environ, "PYTHONPATH": f"{small_run.ROOT}/engine"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_reads_no_schema():
    """The formats and evaluations that the help of `export` and `eval` lists are read when that help is printed."""
    code = "import sys; from sslrun.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print('sslrun.config.schema_reader' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": f"{small_run.ROOT}/engine"}
    for words, expected in ([["--help"], "False"], [["export", "--help"], "True"]):
        done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == expected, done.stderr


def test_the_argument_that_launchers_put_first_is_ignored(capsys):
    assert main(["--local_rank=0", "config", "print", MOCOV2]) == 0
    assert main(["--local-rank=0", MOCOV2, "--dry-run"]) == 0


def test_dry_run_needs_no_data(capsys):
    code, out, _ = call(capsys, MOCOV2, "--set", "epochs=800", "--set", "engine.micro_batch=64", "--dry-run")
    assert code == 0
    assert out.startswith("mocov2_resnet50_8xb32-coslr-200e_in1k\n")
    assert "27.97 M trained" in out and "2 of 224x224 px" in out
    assert "4,003,200 = 800 epochs x 5,004" in out  # 1,281,167 // 256 steps per epoch
    assert "256 = 1 rank(s) x 4 accumulated x 64 at once, BatchNorm groups of 32" in out
    assert "first ids" in out and "MiB per sample" in out


def test_a_missing_data_set_is_named_with_its_key(capsys, tmp_path):
    line = refused(capsys, MOCOV2, "--work-dir", tmp_path)
    assert "data/imagenet/train does not exist" in line and "data.source.data_prefix" in line
    assert not list(tmp_path.iterdir()), "nothing was started, so nothing may be left"


MISTAKES = {
    "misspelled key": (["--set", "epocs=3"], ["epocs", "epochs"]),
    "bad value": (["--set", "epochs=[1,"], ["epochs=[1,"]),
    "batch and group": (["--set", "data.samples_per_gpu=5"], ["global_batch 16", "samples_per_gpu 5"]),
    "micro-batch": (["--set", "engine.micro_batch=12"], ["engine.micro_batch is 12", "8, 16"]),
    "batch above the data": (["--set", "global_batch=800"], ["global_batch of 800"]),
    "a constructor's own word": (["--set", "model.feat_dim=9"], ["feat_dim is 9", "gives 8"]),
    "a rule that matches nothing": (
        ["--set", 'optimizer.paramwise=[{match="^bakbone", lr=1.0}]'],
        ["bakbone", "backbone."],
    ),
    "no such device": (["--set", "engine.device=tpu"], ["engine.device", "cpu"]),
    "a seed out of range": (["--set", "seed=-1"], ["seed is -1", "4294967295"]),
    "weights that are not there": (["--set", "load_from=nowhere"], ["nowhere"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_user_error_is_one_line(capsys, recipe, mistake):
    options, expected = MISTAKES[mistake]
    line = refused(capsys, recipe, *options)
    assert all(text in line for text in expected), line


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("--set epochs=3 seed=1", "each --set takes one KEY=VALUE: --set epochs=3 --set seed=1"),
        ("--set=epochs=3 seed=1", "each --set takes one KEY=VALUE: --set epochs=3 --set seed=1"),
        ("--cfg-options a=[1,2]", "--cfg-options is written --set, once for each key: --set 'a=[1,2]'"),
        ("--cfg-options", "--cfg-options is written --set, once for each key: --set KEY=VALUE"),
    ],
)
def test_options_in_the_wrong_form_are_answered_with_the_form_that_works(capsys, words, answer):
    assert refused(capsys, "config", "diff", MOCOV2, *words.split()) == f"error: {answer}"


def test_an_unknown_option_is_one_line(capsys):
    line = refused(capsys, "config", "print", MOCOV2, "--nope")
    assert line == "error: sslrun config print has no option --nope; see sslrun config print --help"


def test_an_existing_file_after_set_is_not_taken_for_a_pair(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").write_text("seed = 3")
    assert "model is missing" in refused(capsys, "config", "print", "--set", "seed=3", "a=b")


def test_an_empty_folder_is_one_line(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    line = refused(capsys, small_run.write_recipe(tmp_path, tmp_path / "empty"))
    assert "no images" in line and "data.source.data_prefix" in line


@pytest.mark.parametrize(
    "words",
    [
        ["{name}.toml"],
        ["{recipe}", "--set", "load_from={name}"],
        ["{recipe}", "--work-dir", "{name}"],
        ["report", "{name}"],
        ["eval", "knn", "{name}"],
        ["config", "lint", "{name}"],
    ],
    ids=" ".join,
)
def test_a_name_that_no_file_can_have_is_one_line(capsys, recipe, words):
    line = refused(capsys, *(word.format(name="x" * 5000, recipe=recipe) for word in words))
    assert "File name too long" in line


def test_a_base_whose_name_no_file_can_have_is_one_line(capsys, tmp_path):
    path = tmp_path / "long.toml"
    path.write_text(f'extends = "{"x" * 5000}.toml"\n')
    assert "does not exist" in refused(capsys, "config", "print", path)


def test_a_work_dir_that_cannot_be_written_is_one_line(capsys, recipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = refused(capsys, recipe, "--work-dir", tmp_path / "file")
    assert "work_dir" in line


def test_the_same_command_twice_is_refused_and_changes_no_file(capsys, recipe, tmp_path):
    assert call(capsys, recipe)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    line = refused(capsys, recipe)
    assert "--resume" in line
    line = refused(capsys, recipe, "--resume", "--set", "optimizer.lr=0.1")
    assert "optimizer.lr: 0.05 -> 0.1" in line
    for path, content in before.items():
        assert path.read_bytes() == content, path


def test_a_resume_on_other_data_is_refused(capsys, tmp_path, images):
    own = tmp_path / "own"
    shutil.copytree(images, own)
    recipe = small_run.write_recipe(tmp_path, own, steps=4)
    assert call(capsys, recipe)[0] == 0
    shutil.copy(own / "class_0/00.jpg", own / "class_0/zz.jpg")
    shutil.copy(own / "class_0/00.jpg", own / "class_0/zzz.jpg")
    line = refused(capsys, recipe, "--resume")
    assert "trained on 64 samples" in line and "load_from" in line


def test_a_work_dir_in_use_is_refused(capsys, tmp_path, images):
    recipe = small_run.write_recipe(tmp_path, images, steps=5000)
    process = small_run.start(small_run.command(recipe))
    small_run.wait_until(lambda: small_run.last_step(tmp_path / "runs/small") >= 0, process)
    line = refused(capsys, recipe, "--resume")
    assert "in use" in line and str(process.pid) in line
    process.terminate()
    assert small_run.finish(process)[0] == 75


def test_a_finished_run_prints_its_folder_and_how_to_continue(capsys, recipe, tmp_path):
    code, out, _ = call(capsys, recipe, "--set", "log.interval=3")
    run = tmp_path / "runs/small"
    assert code == 0
    assert str(run) in out and "k-NN" in out
    assert f" sslrun train {recipe} --set log.interval=3 --resume --set max_iters=..." in out
    assert {path.name for path in run.iterdir()} >= {
        "config.toml", "env.json", "machine.json", "metrics.jsonl", "log.txt", "state.json", "checkpoints",
    }  # fmt: skip
    rows = small_run.metrics(run)
    assert [row["step"] for row in rows] == [0, 3, 4, 4], "k-NN, log, log at the end, k-NN"
    assert rows[1].keys() >= {"step", "epoch", "wall_s", "train/loss", "train/lr", "train/top1_pct", "data/wait_pct"}
    assert json.loads((run / "state.json").read_text())["state"] == "done"


def test_printed_commands_can_be_typed_as_they_are(capsys, recipe, tmp_path):
    """Paths with spaces are quoted, and a value is set once."""
    places = {"a b": ["--set=max_iters=4"], "c'd": ["--set", "max_iters=3", "--set", "max_iters=4"]}
    for name, lengths in places.items():
        folder = tmp_path / name
        code, out, _ = call(capsys, recipe, "--work-dir", folder, *lengths)
        commands = {line.partition(":")[0]: shlex.split(line.partition("sslrun ")[2]) for line in out.splitlines()}
        assert code == 0 and commands["look at it"] == ["report", str(folder / "small")]
        again = ["train", str(recipe), "--work-dir", str(folder), "--resume", "--set", "max_iters=..."]
        assert commands["train longer"] == again


def test_a_recipe_whose_name_is_no_folder_name_is_refused(capsys, recipe, tmp_path):
    for name in ("...toml", "..toml"):
        shutil.copy(recipe, tmp_path / name)
        assert "names a folder above: rename it" in refused(capsys, tmp_path / name)
    assert not (tmp_path / "config.toml").exists()


def test_a_few_bad_images_do_not_end_a_run_and_many_do(capsys, tmp_path, images):
    damaged = tmp_path / "damaged"
    shutil.copytree(images, damaged)
    files = sorted(damaged.rglob("*.jpg"))
    files[3].write_bytes(files[3].read_bytes()[:300])
    files[40].write_bytes(b"")
    recipe = small_run.write_recipe(tmp_path, damaged, steps=8)
    few = ["--set", "data.max_bad_pct=5", "--set", "monitor.knn_interval=0"]
    code, _, err = call(capsys, recipe, *few)
    assert code == 0, err
    assert {str(path) for path in (files[3], files[40]) if str(path) in err}, "bad images are named"
    _, state = checkpoint.load(tmp_path / "runs/small/checkpoints/step_00000008")
    assert 1 <= len(state["bad_samples"]) <= 2  # one of them may be held out
    for path in files[5:60:4]:
        path.write_bytes(b"no image")
    code, _, err = call(capsys, recipe, *few, "--work-dir", tmp_path / "again")
    assert code == 1
    assert "max_bad_pct" in err.splitlines()[-1] and "Traceback" not in err
    assert json.loads((tmp_path / "again/small/state.json").read_text())["exit_code"] == 1


def test_a_diverging_loss_stops_the_run_and_its_checkpoint_is_finite(capsys, recipe, tmp_path):
    code, _, err = call(capsys, recipe, "--set", "optimizer.lr=1e30", "--set", "checkpoint.interval=1")
    assert code == 3
    assert "not finite" in err.splitlines()[-1]
    newest = checkpoint.newest_good(tmp_path / "runs/small/checkpoints")
    for name, tensor in checkpoint.load(newest)[0]["model"].items():
        assert tensor.isfinite().all(), name


def test_weights_are_loaded_and_mismatches_reported(capsys, recipe, tmp_path):
    assert call(capsys, recipe)[0] == 0
    run = tmp_path / "runs/small"
    weights = ["--set", f"load_from={run}", "--set", "optimizer.lr=0.0", "--set", "model.momentum=1.0"]
    code, _, err = call(capsys, recipe, *weights, "--work-dir", tmp_path / "tuned")
    assert code == 0 and "all of them fit" in err
    first = checkpoint.load(run / "checkpoints/step_00000004")[0]["model"]
    second = checkpoint.load(tmp_path / "tuned/small/checkpoints/step_00000004")[0]["model"]
    assert all((first[n] == second[n]).all() for n in first if n.endswith("weight")), "nothing moves at lr 0"

    other = [*weights, "--set", "model.queue_len=48", "--work-dir", tmp_path / "other"]
    line = refused(capsys, recipe, *other)
    assert "queue.rows" in line and "another shape" in line
    code, _, err = call(capsys, recipe, *other, "--set", "load_strict=false")
    assert code == 0 and "queue.rows" in err


def test_a_users_own_method(capsys, tmp_path, images, monkeypatch):
    """Uses custom_imports, and the features that clustering methods request in before_epoch."""
    (tmp_path / "my_method.py").write_text(
        "import torch\n"
        "from sslrun import Backbone, Loss, Method\n"
        "class Cluster(Method):\n"
        '    """One center that the features are pulled to.\n\n    Args:\n        backbone: the network.\n    """\n'
        "    def __init__(self, backbone: Backbone) -> None:\n"
        "        super().__init__()\n"
        "        self.backbone = backbone\n"
        "        self.register_buffer('center', torch.zeros(backbone.num_features))\n"
        "        self.register_buffer('shape', torch.zeros(2))\n"
        "    def before_epoch(self, progress, features):\n"
        "        rows = features(self.backbone)\n"
        "        self.center.copy_(rows.mean(0))\n"
        "        self.shape.copy_(torch.tensor(rows.shape))\n"
        "    def forward(self, batch, progress, targets):\n"
        "        pooled = self.backbone(batch.crops()[0])[-1].mean((2, 3))\n"
        "        return Loss((pooled - self.center).square().mean())\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = small_run.write_recipe(tmp_path, images, steps=5)
    text = recipe.read_text()
    begin, end = text.index("[model]"), text.index("[data]")
    own = '[model]\ntype = "Cluster"\nbackbone = { type = "ResNet", depth = 18, base_width = 4, stem = "small" }\n\n'
    recipe.write_text('custom_imports = ["my_method"]\n' + text[:begin] + own + text[end:])
    code, _, err = call(capsys, recipe)
    assert code == 0, err
    model = checkpoint.load(tmp_path / "runs/small/checkpoints/step_00000005")[0]["model"]
    assert model["shape"].tolist() == [64, 32], "features of the whole training set: 80 images, a fifth held out"
    assert model["center"].abs().sum() > 0


def test_missing_packages_are_answered_with_make_install(tmp_path):
    shutil.copytree(small_run.ROOT / "bin", tmp_path / "bin")
    (tmp_path / "engine").symlink_to(small_run.ROOT / "engine")
    bare = [sys.executable, "-S", "-E", str(tmp_path / "bin/sslrun"), "--help"]  # -S: no site-packages
    done = subprocess.run(bare, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "make install" in done.stderr


def test_the_run_folder_is_named_by_the_recipe_behind_an_alias(capsys):
    name = "mocov2_resnet50_8xb32-coslr-200e_in1k"
    assert call(capsys, MOCOV2, "--dry-run", "--set", "engine.micro_batch=32")[1].startswith(name)
    assert (Path(MOCOV2).parent / "selfsup/mocov2" / f"{name}.toml").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("global_batch = 7", "global_batch 7 is not a multiple of data.samples_per_gpu 8"),
        ("global_batch = 0", "global_batch is 0 and data.samples_per_gpu is 8"),
        ("engine.micro_batch = 3", "engine.micro_batch is 3, but 16 samples per process"),
        ("model.neck.in_channels = 3", "model.neck: MoCoV2Neck takes 3 channels (in_channels), but is given 32"),
        ("model.head = { type = 'ContrastiveHead', temperature = -1 }", "temperature"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_what_does_not_fit_names_the_file_and_the_line(capsys, recipe, tmp_path, setting, words, options):
    file = tmp_path / "own.toml"
    file.write_text(f'extends = "{recipe}"\n\n{setting}\n')
    line = refused(capsys, file, *options)
    assert line.startswith(f"error: {file}:3: ") and words in line
