"""A run logs at its start which settings are allowed but rarely meant with its images."""

from pathlib import Path

import pytest
import torch

import small_run
from small_run import call
from sslrun.advice import _knn
from sslrun.config import load
from sslrun.recipe import Recipe


def told(out: str) -> list[str]:
    return [line.removeprefix("advice").strip() for line in out.splitlines() if line.startswith("advice")]


def test_each_mismatch_with_the_images_is_a_line_of_advice(tmp_path, images, capsys):
    recipe = small_run.write_recipe(tmp_path, images, steps=2)
    assert told(call(capsys, recipe, "--dry-run", "--set=log.interval=1")[1]) == []
    sets = ["model.queue_len=100", "global_batch=1", "data.samples_per_gpu=1", "lr={warmup='linear',warmup_iters=2}"]
    sets.append("log.wandb.group='seeds'")
    code, out, err = call(capsys, recipe, "--dry-run", "--set=log.interval=500", *(f"--set={one}" for one in sets))
    queue, batch, log, warm_up, hooks = told(out) if code == 0 else [err] * 5
    assert queue.startswith("model.queue_len is 100, but there are ") and queue.endswith("negatives: 64 or less")
    assert batch.startswith("global_batch leaves one image at a time, and MoCo ")
    assert log.startswith("log.interval is 500 steps, but an epoch has ")
    assert warm_up.startswith("lr.warmup_iters makes a warm-up of 2 steps, but the run has 2")
    assert hooks == 'log.wandb is set, but log.hooks does not name "wandb", so it gets no rows'
    assert told(call(capsys, recipe, "--dry-run", f"--set={sets[-1]}", "--set=log.hooks=['wandb']")[1]) == []


def test_a_run_logs_the_advice(tmp_path, images, capsys):
    recipe = small_run.write_recipe(tmp_path, images, steps=1)
    assert "advice: model.queue_len is 100" in call(capsys, recipe, "--set=model.queue_len=100")[2]


@pytest.mark.parametrize(
    ("name", "is_measured"), [("mae", False), ("simmim", False), ("maskfeat", False), ("dino", True)]
)
def test_methods_that_predict_pixels_are_measured_by_a_probe(name, is_measured):
    def lines(*sets):
        with torch.device("meta"):
            recipe = load(Path(__file__).parents[1] / f"configs/learn/{name}.toml", sets).build(Recipe)
        return _knn(recipe, None)

    assert lines() == lines("monitor.knn_interval=0", "monitor.probe_interval=0") == [], "it has a probe, or no k-NN"
    found = lines("monitor.knn_interval=3", "monitor.probe_interval=0")
    assert len(found) == (not is_measured)
    assert all(line.endswith("monitor.probe_interval = 3 adds a linear probe") for line in found)
