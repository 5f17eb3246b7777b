"""`sslrun init`: a recipe that fits a folder of images and the machine, and a batch script for Slurm."""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import small_run
from small_run import call
from sslrun.config import load
from sslrun.first_recipe import Looked, recipe
from test_advice import told


def test_the_recipe_fits_any_number_and_size_of_images(tmp_path):
    path = tmp_path / "a b.toml"
    chosen = set()
    for count, side, classes, gpus in itertools.product((16, 100, 3_000, 50_000), (20, 80, 500), (0, 7), (0, 4)):
        cores = 2 if gpus == 0 else 32
        seen = Looked('/my "images"', count, classes, (10, side, 2 * side), 1, "cuda" if gpus else "cpu", gpus, cores)
        path.write_text(recipe(seen, str(path)))
        values = load(path).values
        trained = count - round(0.1 * count)
        batch, size = values["global_batch"], values["data"]["views"][0]["transforms"][0]["size"]
        assert batch % values["data"]["samples_per_gpu"] == 0 and 2 <= batch <= trained
        assert values["data"]["samples_per_gpu"] >= 2
        assert values["model"]["queue_len"] <= trained and values["log"]["interval"] <= trained // batch
        assert 32 <= size <= max(32, side) and values["lr"]["warmup_epochs"] < values["epochs"] <= 800
        assert (values["monitor"]["knn_interval"] > 0) == (classes > 0) and values["monitor"]["rankme_interval"] > 0
        assert values["data"]["source"] == {"type": "ImageFolder", "data_prefix": '/my "images"'}
        assert all(len(line) <= 120 for line in path.read_text().splitlines() if "sslrun" not in line)
        chosen.add((values["model"]["backbone"]["depth"], size, gpus > 0))
    assert {(18, 32, False), (18, 96, False), (18, 224, True), (50, 224, True)} <= chosen
    assert all(depth == 18 and size <= 96 for depth, size, has_gpu in chosen if not has_gpu)


def test_init_looks_at_a_folder_and_its_recipe_starts_without_advice(tmp_path, images, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    code, out, _ = call(capsys, "init", images, "--slurm")
    assert code == 0 and "sslrun recipe.toml" in out and "sbatch recipe.sbatch" in out
    text = Path("recipe.toml").read_text()
    classes, count = len(list(images.iterdir())), len(list(images.rglob("*.jpg")))
    assert f"{count} images in {classes} class folders" in text and "no GPU" in text
    code, out, _ = call(capsys, "recipe.toml", "--dry-run")
    assert code == 0 and told(out) == []
    assert subprocess.run(["bash", "-n", "recipe.sbatch"]).returncode == 0
    script = Path("recipe.sbatch").read_text()
    assert re.search(r"^run=\(.*sslrun recipe\.toml \"\$@\"\)$", script, re.MULTILINE)
    assert "--ntasks-per-node=1\n#SBATCH --gpus-per-node=1\n" in script and "bin/sslrun.slurm" not in script
    assert "#SBATCH --signal=USR1@120\n#SBATCH --requeue\n" in script and 'requeue "$SLURM_JOB_ID"' in script


@pytest.mark.parametrize("script", ["recipe.sbatch", str(small_run.ROOT / "bin/sslrun.slurm")])
def test_the_batch_script_queues_a_job_again_after_75_alone(tmp_path, monkeypatch, capsys, script):
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").touch()
    assert call(capsys, "init", "--slurm")[0] == 0
    (tmp_path / "bin").mkdir()
    for name, body in (("srun", 'echo "$@" > started; exit $RUN_ENDS_WITH'), ("scontrol", 'echo "$@" > queued')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    words = ["--set=seed=1"] if script == "recipe.sbatch" else ["recipe.toml", "--set=seed=1"]
    for code in (0, 1, 75):
        environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7", "RUN_ENDS_WITH": str(code)}
        assert subprocess.run(["bash", script, *words], env=environment).returncode == code
        assert Path("queued").exists() == (code == 75)
        assert Path("started").read_text().endswith("sslrun recipe.toml --set=seed=1 --resume\n")
    assert Path("queued").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gone"], "gone does not exist (relative to "),
        (["empty"], "empty has no images"),
        (["few"], "few has 2 images; training needs at least 16"),
        (["few", "-o", "old.toml"], "old.toml exists; --force replaces it"),
        (["few", "-o", "recipe.yaml"], "recipe.yaml: a recipe is a TOML file"),
        ([], "init needs the folder of the images"),
        (["--slurm"], "recipe.toml does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, images, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("few").mkdir()
    Path("old.toml").touch()
    for image in list(images.rglob("*.jpg"))[:2]:
        shutil.copy(image, "few")
    before = sorted(Path().iterdir())
    code, _, err = call(capsys, "init", *words)
    assert code == 2 and len(err.splitlines()) == 1 and expected in err and ": set data" not in err
    assert sorted(Path().iterdir()) == before


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(path.stem for path in (small_run.ROOT / "configs/small").iterdir()))
def test_a_small_recipe_runs_on_an_unlabeled_folder_without_an_edit(tmp_path, images, monkeypatch, capsys, name):
    """Shortened to two steps of a small batch."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for number, image in enumerate(images.rglob("*.jpg")):
        shutil.copy(image, f"images/{number}.jpg")
    shorter = ["global_batch=4", "data.samples_per_gpu=2", '_delete_=["epochs"]', "max_iters=2", "lr.warmup_epochs=0.1"]
    code, out, err = call(capsys, f"small/{name}", *(f"--set={one}" for one in (*shorter, "engine.threads=1")))
    assert code == 0 and re.search(r"knn_interval.*: left out, since", err) and "done: work_dirs/" in out, err
    rows = small_run.metrics(Path("work_dirs") / name)
    assert {"val/loss", "spectrum/rankme"} <= rows[0].keys() and rows[-1]["step"] == 2
