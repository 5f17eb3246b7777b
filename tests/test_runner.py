"""Length of a run, checkpoints, logging and clipping (the tutorial's runner, hooks and policies), through the command
line."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest

import small_run
from sslrun.cli import main
from sslrun.runtime import checkpoint

FIXED = 'lr={_delete_=true,policy="Constant"}'
QUIET = "monitor.knn_interval=0"


@pytest.fixture
def recipe(tmp_path, images):
    """An epoch is 4 steps: 64 images to train on, 16 to a batch."""
    return small_run.write_recipe(tmp_path, images, steps=6)


@pytest.fixture
def by_epochs(recipe):
    recipe.write_text(recipe.read_text().replace("max_iters = 6", "epochs = 2"))
    return recipe


def train(recipe: Path, work_dir: Path, *options: str, resume: bool = False) -> Path:
    """One training in this process; its run folder."""
    words = [f"--set={option}" for option in (QUIET, *options)] + ["--resume"] * resume
    assert main([str(recipe), "--work-dir", str(work_dir), *words]) == 0
    return work_dir / "small"


def column(run: Path, name: str) -> dict[int, Any]:
    return {row["step"]: row[name] for row in small_run.metrics(run) if name in row}


def saved(run: Path) -> list[int]:
    return list(checkpoint.steps(run / "checkpoints"))


def weights(run: Path, step: int) -> dict[str, Any]:
    return checkpoint.load(run / f"checkpoints/step_{step:08d}")[0]["model"]


def test_epochs_and_a_resume_with_more_of_them(by_epochs, tmp_path):
    """Two epochs and one more are three, where the schedule does not look at the length of the run."""
    straight = train(by_epochs, tmp_path / "straight", FIXED, "epochs=3")
    parts = train(by_epochs, tmp_path / "parts", FIXED)
    assert saved(parts)[-1] == 8
    train(by_epochs, tmp_path / "parts", FIXED, "epochs=3", resume=True)
    assert saved(parts)[-1] == 12
    assert small_run.differences(*(run / "checkpoints/step_00000012" for run in (straight, parts))) == []


def test_a_schedule_follows_the_new_length(by_epochs, tmp_path):
    run = train(by_epochs, tmp_path, "log.interval=1")
    train(by_epochs, tmp_path, "log.interval=1", "epochs=4", resume=True)
    lengths = {step: 8 if step <= 8 else 16 for step in range(1, 17)}
    expected = {step: 0.025 * (1 + math.cos(math.pi * (step - 1) / length)) for step, length in lengths.items()}
    assert column(run, "train/lr") == pytest.approx(expected)


@pytest.mark.parametrize("total", [6, 3])
def test_a_run_that_is_done_stays_so(recipe, tmp_path, capsys, total):
    run = train(recipe, tmp_path)
    rows = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    train(recipe, tmp_path, f"max_iters={total}", resume=True)
    assert f"nothing is left to do: 6 of {total} steps are done" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == rows and saved(run)[-1] == 6


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["checkpoint.by=epoch", "checkpoint.interval=1"], [4, 8, 10]),
        (["checkpoint.by=epoch", "checkpoint.interval=2"], [8, 10]),
        (["checkpoint.by=iter", "checkpoint.interval=3", "checkpoint.max_keep_ckpts=2"], [9, 10]),
        (["checkpoint.by=iter", "checkpoint.interval=3", "checkpoint.max_keep_ckpts=-1"], [3, 6, 9, 10]),
    ],
)
def test_checkpoints_are_written_when_due_and_the_newest_stay(recipe, tmp_path, options, expected):
    assert saved(train(recipe, tmp_path, "max_iters=10", *options)) == expected


def test_rows_come_at_the_interval_and_the_level_hides_messages_not_rows(recipe, tmp_path, capsys):
    run = train(recipe, tmp_path / "loud", "log.interval=4")
    assert list(column(run, "train/loss")) == [4, 6]
    assert "all of 6 steps" in capsys.readouterr().err and "all of 6 steps" in (run / "log.txt").read_text()
    run = train(recipe, tmp_path / "still", "log.interval=4", "log.level=WARNING")
    assert list(column(run, "train/loss")) == [4, 6]
    assert not capsys.readouterr().err and not (run / "log.txt").read_text()


def test_tensorboard_has_the_rows(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(recipe, tmp_path, 'log.hooks=["tensorboard"]', "monitor.loss_interval=1")
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("train/loss", "train/lr", "val/loss"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx(column(run, name), rel=1e-6) and shown, name


def test_a_hook_without_its_package_is_one_line_and_costs_nothing(recipe, tmp_path, capsys, monkeypatch):
    for loaded in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    words = [str(recipe), "--work-dir", str(tmp_path), "--set", QUIET]
    assert main([*words, "--set", 'log.hooks=["tensorboard"]']) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "log.hooks" in line and "pip install tensorboard" in line
    assert main(words) == 0, "it was not started, so it may be started"


def test_resume_from_goes_on_where_another_run_was_and_then_by_itself(recipe, tmp_path, capsys):
    first = train(recipe, tmp_path / "first", FIXED, "max_iters=4")
    source = f"resume_from={first}"
    second = train(recipe, tmp_path / "second", FIXED, "max_iters=5", source)
    assert "all of" not in capsys.readouterr().err.splitlines()[-1] and saved(second) == [5]
    train(recipe, tmp_path / "second", FIXED, "max_iters=8", source, resume=True)
    assert f"continuing from {second / 'checkpoints/step_00000005'}" in capsys.readouterr().err, "its own is newer"
    straight = train(recipe, tmp_path / "first", FIXED, "max_iters=8", resume=True)
    assert small_run.differences(*(run / "checkpoints/step_00000008" for run in (straight, second))) == []


STILL = ["optimizer.momentum=0.0", "optimizer.weight_decay=0.0", FIXED]


def test_the_gradient_is_clipped_by_the_norm_that_is_asked_for(recipe, tmp_path):
    """One step of plain SGD moves weights by lr times the gradient, so the norm of the move is lr times max_norm."""
    start = weights(train(recipe, tmp_path / "start", *STILL, "max_iters=1", "optimizer.lr=0.0"), 1)
    for norm_type, norm in ((2.0, 2.0), ('"inf"', math.inf), (1, 1.0)):
        clip = f"optimizer.grad_clip={{max_norm=1.0,norm_type={norm_type}}}"
        run = train(recipe, tmp_path / str(norm), *STILL, "max_iters=1", "optimizer.lr=0.5", clip)
        moved = [
            (tensor.double() - start[name].double()).flatten()
            for name, tensor in weights(run, 1).items()
            if name.startswith(("backbone.", "neck.")) and name.endswith(("weight", "bias"))
        ]
        total = sum(move.norm(norm) ** norm for move in moved) ** (1 / norm) if norm < math.inf else None
        total = max(move.abs().max() for move in moved) if total is None else total
        assert float(total) == pytest.approx(0.5, rel=1e-3), norm
        (seen,) = column(run, "train/grad_norm").values()
        assert seen > 1.0, "before clipping"


def test_rules_by_name_apply_in_order(recipe, tmp_path):
    frozen, thawed = '{match="^backbone",lr_mult=0.0}', "{match='backbone\\.layer4.*conv',lr=0.1}"
    rules = f'optimizer.paramwise=[{frozen},{thawed},{{match="bn",lr_mult=0.0}}]'
    run = train(recipe, tmp_path / "ruled", *STILL, rules, "max_iters=2")
    start = weights(train(recipe, tmp_path / "start", *STILL, "max_iters=1", "optimizer.lr=0.0"), 1)
    moved = {n for n, tensor in weights(run, 2).items() if not (tensor == start[n]).all()}
    trained = {n for n in start if n.startswith(("backbone.", "neck.")) and n.endswith(("weight", "bias"))}
    expected = {n for n in trained if n.startswith("neck.") or ("backbone.layer4" in n and "conv" in n)}
    assert moved & trained == expected and len(expected) > 4


# One that goes by epochs and one that goes by steps, with a warm-up; test_schedules.py has the others.
POLICIES = {
    'policy="Step",step=1,gamma=0.1': [0.05] * 4 + [0.005] * 2,
    'policy="Poly",power=2.0,by="iter",warmup="exp",warmup_iters=2,warmup_ratio=0.25': [
        0.05 * (1 - step / 6) ** 2 * {0: 0.25, 1: 0.5}.get(step, 1.0) for step in range(6)
    ],
}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_steps_have_their_policys_rate(recipe, tmp_path, policy):
    run = train(recipe, tmp_path, f"lr={{_delete_=true,{policy}}}", "log.interval=1")
    assert list(column(run, "train/lr").values()) == pytest.approx(POLICIES[policy])


def test_threads_and_prefetch_may_change_and_change_nothing(recipe, tmp_path):
    one = train(recipe, tmp_path / "one", FIXED, "data.workers_per_gpu=1", "data.prefetch=1")
    other = train(recipe, tmp_path / "other", FIXED, "max_iters=3", "data.workers_per_gpu=4", "data.prefetch=5")
    train(recipe, tmp_path / "other", FIXED, "data.workers_per_gpu=2", "data.prefetch=3", resume=True)
    assert small_run.differences(*(run / "checkpoints/step_00000006" for run in (one, other))) == []


MISTAKES = {
    "no steps": (["max_iters=0"], "max_iters must be at least 1, not 0"),
    "fewer than none": (["max_iters=-3"], "max_iters must be at least 1, not -3"),
    "a checkpoint never": (["checkpoint.interval=0"], "checkpoint: interval must be at least 1, not 0"),
    "none to keep": (["checkpoint.max_keep_ckpts=0"], "max_keep_ckpts must be at least 1, or -1 for all"),
    "no rows": (["log.interval=0"], "log.interval must be at least 1"),
    "an unknown hook": (['log.hooks=["TextLoggerHook"]'], 'log.hooks.0: expected "tensorboard", "wandb" or "mlflow"'),
    "an unknown level": (["log.level=info"], 'expected "DEBUG", "INFO", "WARNING" or "ERROR"'),
    "no threads": (["data.workers_per_gpu=0"], "data.workers_per_gpu must be at least 1"),
    "no room": (["data.prefetch=0"], "data.prefetch must be at least 1"),
    "nothing is left": (["optimizer.grad_clip.max_norm=0.0"], "max_norm must be above 0"),
    "half a clip": (["optimizer.grad_clip.norm_type=2.0"], "max_norm is missing"),
    "a policy of mmcv": (["lr.policy=fixed"], "fixed is Constant here"),
    "too short a schedule": (
        ['lr={_delete_=true,policy="CosineRestart",periods=[1]}'],
        "ends after 4 steps (1 epochs)",
    ),
    "a rate below nothing": (['optimizer.paramwise=[{match="bn",lr=-1.0}]'], "lr cannot be -1.0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(recipe, tmp_path, capsys, mistake):
    options, expected = MISTAKES[mistake]
    words = [f"--set={option}" for option in options]
    assert main([str(recipe), "--work-dir", str(tmp_path / "runs"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not (tmp_path / "runs/small/metrics.jsonl").exists()
