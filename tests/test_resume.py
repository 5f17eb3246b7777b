"""Exact resume, through the command line: N + M steps give the same bits as N steps, a kill, --resume and M steps."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

import small_run
from sslrun.runtime import checkpoint, executor

STEPS = 24


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_killed_and_resumed_is_straight_through(tmp_path, images, ranks):
    recipe = small_run.write_recipe(tmp_path, images, steps=STEPS)
    monitors = "\n".join(f"{name}_interval = 1" for name in ("knn", "loss", "probe", "rankme"))
    recipe.write_text(recipe.read_text().replace("knn_interval = 1", monitors))
    small_run.train(recipe, "--work-dir", str(tmp_path / "straight"), ranks=ranks)
    straight, killed = tmp_path / "straight" / "small", tmp_path / "killed" / "small"

    process = small_run.start(small_run.command(recipe, "--work-dir", str(killed.parent), ranks=ranks))
    small_run.wait_until(lambda: small_run.last_step(killed) >= 6, process)  # an epoch is 4 steps: in the middle of one
    os.kill(
        json.loads((killed / "state.json").read_text())["pid"], signal.SIGKILL
    )  # rank 0; its launcher ends the rest
    small_run.finish(process)
    newest = checkpoint.newest_good(killed / "checkpoints")
    assert newest is not None and newest.name < f"step_{STEPS:08d}", "it was over before it was killed"
    shutil.copytree(killed, tmp_path / "control" / "small")

    small_run.train(recipe, "--work-dir", str(killed.parent), "--resume", ranks=ranks)
    assert f"continuing from {newest}" in (killed / "log.txt").read_text()
    last = f"checkpoints/step_{STEPS:08d}"
    assert small_run.differences(straight / last, killed / last) == []
    assert small_run.timeless(small_run.metrics(straight)) == small_run.timeless(small_run.metrics(killed))

    if ranks == 1:  # control: with one number of the state changed, everything after it differs
        control = tmp_path / "control" / "small"
        tensors, state = checkpoint.load(checkpoint.newest_good(control / "checkpoints"))
        tensors["model"]["queue.oldest"] += 1
        shutil.rmtree(control / "checkpoints")
        checkpoint.save(control / "checkpoints", state["step"], tensors, state)
        small_run.train(recipe, "--work-dir", str(control.parent), "--resume")
        found = small_run.differences(straight / last, control / last)
        assert "model/backbone.conv1.weight" in found and "model/queue.rows" in found
        assert small_run.timeless(small_run.metrics(straight)) != small_run.timeless(small_run.metrics(control))


OWN_BACKBONE = [
    'custom_imports=["own_backbone"]',
    'model.backbone={ _delete_ = true, type = "OwnBackbone" }',
    "data.samples_per_gpu=4",
    "engine.micro_batch=4",  # four micro-batches on one rank, two on each of two
    "checkpoint.interval=3",
    "checkpoint.max_keep_ckpts=9",
]
MONITORS = [f"monitor.{name}_interval=1" for name in ("knn", "loss", "probe", "rankme")]


def own_backbone_run(recipe: Path, work_dir: Path, *settings: str, resume: bool = False, ranks: int = 1) -> Path:
    """Nine steps of MoCo, whose key encoder runs in `targets`; returns the run folder."""
    options = [f"--set={setting}" for setting in [*OWN_BACKBONE, *settings]]
    small_run.train(recipe, "--work-dir", str(work_dir), *options, *["--resume"] * resume, ranks=ranks)
    return work_dir / "small"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_dropout_of_a_users_backbone_resumes_exactly(tmp_path, images, ranks):
    """Whatever draws from torch's generators is a function of the step, the rank and the micro-batch."""
    recipe = small_run.write_recipe(tmp_path, images, steps=9)
    straight = own_backbone_run(recipe, tmp_path / "straight", *MONITORS, ranks=ranks)
    last = "checkpoints/step_00000009"

    small_run.as_of(straight, 3, tmp_path / "resumed")
    resumed = own_backbone_run(recipe, tmp_path / "resumed", *MONITORS, resume=True, ranks=ranks)
    assert small_run.differences(straight / last, resumed / last) == []
    assert small_run.timeless(small_run.metrics(straight)) == small_run.timeless(small_run.metrics(resumed))

    if ranks == 1:  # measurements in between change nothing
        unmeasured = own_backbone_run(recipe, tmp_path / "unmeasured", "monitor.knn_interval=0")
        assert small_run.differences(straight / last, unmeasured / last) == []


@pytest.mark.nightly
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_network_that_draws_resumes_exactly(tmp_path, images, ranks):
    """Stochastic depth and rescaled positions, four micro-batches on one rank."""
    network = (
        'model.backbone={ _delete_ = true, type = "VisionTransformer", img_size = 24, patch_size = 8, embed_dim = 32, '
        'depth = 3, num_heads = 2, positions = "rotary", rotary_rescale = 2.0, drop_path = 0.4 }'
    )
    settings = [network, "model.neck.with_avg_pool=false", *MONITORS]
    recipe = small_run.write_recipe(tmp_path, images, steps=9)
    straight = own_backbone_run(recipe, tmp_path / "straight", *settings, ranks=ranks)
    small_run.as_of(straight, 3, tmp_path / "resumed")
    resumed = own_backbone_run(recipe, tmp_path / "resumed", *settings, resume=True, ranks=ranks)
    last = "checkpoints/step_00000009"
    assert small_run.differences(straight / last, resumed / last) == []
    assert small_run.timeless(small_run.metrics(straight)) == small_run.timeless(small_run.metrics(resumed))


@pytest.mark.nightly
def test_dropout_resumes_exactly_when_compiled(tmp_path, images):
    recipe = small_run.write_recipe(tmp_path, images, steps=9)
    straight = own_backbone_run(recipe, tmp_path / "straight", "engine.compile=on")
    small_run.as_of(straight, 3, tmp_path / "resumed")
    resumed = own_backbone_run(recipe, tmp_path / "resumed", "engine.compile=on", resume=True)
    last = "checkpoints/step_00000009"
    assert small_run.differences(straight / last, resumed / last) == []


def test_without_seeded_steps_that_backbone_would_not_resume_exactly(tmp_path, images, monkeypatch):
    """The control of the test above."""
    monkeypatch.setattr(executor, "seed_torch", lambda *_: None)
    recipe = small_run.write_recipe(tmp_path, images, steps=9)
    straight = own_backbone_run(recipe, tmp_path / "straight")
    small_run.as_of(straight, 3, tmp_path / "resumed")
    resumed = own_backbone_run(recipe, tmp_path / "resumed", resume=True)
    last = "checkpoints/step_00000009"
    assert "model/backbone.body.0.weight" in small_run.differences(straight / last, resumed / last)


@pytest.mark.parametrize(
    ("number", "code", "state"),
    [
        (signal.SIGTERM, 75, "pre-empted"),
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.nightly),
    ],
)
def test_a_signal_saves_and_leaves(tmp_path, images, number, code, state):
    recipe = small_run.write_recipe(tmp_path, images, steps=5000)
    run = tmp_path / "runs" / "small"
    process = small_run.start(small_run.command(recipe))
    small_run.wait_until(lambda: small_run.last_step(run) >= 6, process)
    process.send_signal(number)
    returned, output = small_run.finish(process)
    assert returned == code, output[-2000:]
    assert "--resume" in output.splitlines()[-1]
    record = json.loads((run / "state.json").read_text())
    assert (record["state"], record["exit_code"]) == (state, code)
    newest = checkpoint.newest_good(run / "checkpoints")
    saved = checkpoint.load(newest)[1]["step"]
    assert saved >= small_run.last_step(run), "what was computed was not saved"


def test_two_processes_compute_what_one_does(tmp_path, images):
    """The same samples, crops, BatchNorm groups and shuffle: one step is equal to rounding, under ZeRO 0 and 3.

    One step, because rounding grows with each: one process on two micro-batches differs from itself as much.
    """
    recipe = small_run.write_recipe(tmp_path, images, steps=1)
    small_run.train(recipe, "--work-dir", str(tmp_path / "one"))
    one = checkpoint.load(tmp_path / "one/small/checkpoints/step_00000001")[0]["model"]
    (row,) = [row for row in small_run.metrics(tmp_path / "one/small") if "train/loss" in row]
    for stage in (0, 3):
        where = tmp_path / f"two{stage}"
        small_run.train(recipe, "--work-dir", str(where), "--set", f"engine.zero_stage={stage}", ranks=2)
        two = checkpoint.load(where / "small/checkpoints/step_00000001")[0]["model"]
        assert one.keys() == two.keys()
        for name in one:
            assert (one[name].double() - two[name].double()).abs().max() < 1e-6, (stage, name)
        (other,) = [row for row in small_run.metrics(where / "small") if "train/loss" in row]
        for name in ("train/loss", "train/grad_norm", "train/top1_pct"):  # the spread is that of a micro-batch
            assert row[name] == pytest.approx(other[name], rel=1e-5), (stage, name)


def test_a_run_on_two_ranks_goes_on_on_one(tmp_path, images):
    recipe = small_run.write_recipe(tmp_path, images, steps=8)
    small_run.train(recipe, "--set", "max_iters=4", ranks=2)
    small_run.train(recipe, "--resume", "--set", "max_iters=8")
    assert [row["step"] for row in small_run.metrics(tmp_path / "runs/small") if "train/loss" in row] == [3, 4, 6, 8]


@pytest.mark.nightly  # by day ranks start from the launcher's environment alone
def test_the_deepspeed_launcher_trains(tmp_path, images):
    recipe = small_run.write_recipe(tmp_path, images, steps=1)
    recipe.write_text(recipe.read_text().replace("knn_interval = 1", "knn_interval = 0"))
    launcher = [str(Path(small_run.sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    launcher += ["--master_port", str(small_run.free_port())]
    process = small_run.start([*launcher, str(small_run.ROOT / "bin/sslrun"), str(recipe)])
    code, output = small_run.finish(process)
    assert code == 0, output[-3000:]
    assert checkpoint.newest_good(tmp_path / "runs/small/checkpoints") is not None


@pytest.mark.nightly
def test_replaced_images_are_said(tmp_path, images):
    copy = Path(shutil.copytree(images, tmp_path / "images"))
    recipe = small_run.write_recipe(tmp_path, copy, steps=2)
    small_run.train(recipe)
    run, said = tmp_path / "runs" / "small", "images of data.source have other names, sizes or lengths"
    small_run.train(recipe, "--resume")
    assert said not in (run / "log.txt").read_text()
    shutil.copy(copy / "class_0" / "01.jpg", copy / "class_0" / "02.jpg")
    tensors, state = checkpoint.load(checkpoint.newest_good(run / "checkpoints"))
    del state["images"]  # a checkpoint of an earlier version
    shutil.copytree(run, tmp_path / "earlier" / "small")
    shutil.rmtree(tmp_path / "earlier" / "small" / "checkpoints")
    checkpoint.save(tmp_path / "earlier" / "small" / "checkpoints", state["step"], tensors, state)
    small_run.train(recipe, "--resume", "--work-dir", str(tmp_path / "earlier"))
    assert said not in (tmp_path / "earlier" / "small" / "log.txt").read_text()
    small_run.train(recipe, "--resume")
    assert (run / "log.txt").read_text().count(said) == 1
