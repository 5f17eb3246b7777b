"""Fine-tuning: its recipe, that it learns, resumes, and keeps its result."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from small_run import call
from sslrun.evaluation.finetune_recipe import Finetune, recipe
from sslrun.nn.resnet import ResNet
from sslrun.nn.vit import VisionTransformer
from sslrun.optim.optimizers import AdamW
from sslrun.runtime import checkpoint
from sslrun.saved import open_saved

FAST = [
    "--set", "eval.finetune.epochs=6", "--set", "eval.finetune.global_batch=16",
    "--set", "eval.finetune.samples_per_gpu=16", "--set", "eval.finetune.lr={policy='Constant'}",
]  # fmt: skip


def record(run: Path) -> dict:
    (path,) = (run / "eval").glob("finetune_*.json")
    return json.loads(path.read_text())


def test_it_learns_the_classes_and_does_not_change_the_run(capsys, run):
    before = checkpoint.load_weights(run)
    # Classes differ by the width of their stripes: no crop may change it.
    crop = "transforms=[{type='CenterCrop',size=24}]"
    learning = [crop, f"finetune.{crop}", "finetune.epochs=20", "finetune.optimizer={type='AdamW',lr=3e-3}"]
    words = [word for setting in learning for word in ("--set", f"eval.{setting}")]
    code, out, err = call(capsys, "eval", "finetune", run, *FAST, *words)
    assert code == 0, err
    kept = record(run)
    results = kept["results"]
    assert out.split()[:2] == ["finetune/top1_pct", f"{results['finetune/top1_pct']:.1f}"]
    tested = [row["test/top1_pct"] for row in results["curve"] if "test/top1_pct" in row]
    assert len(tested) == 5  # before, and after every five epochs
    assert results["finetune/top1_pct"] == tested[-1] > max(tested[0], 60)  # of four classes
    assert kept["recipe"]["model"]["num_classes"] == 4
    assert (kept["data"]["train_samples"], kept["data"]["test_samples"]) == (64, 16)
    after = checkpoint.load_weights(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_starts_with_the_encoder_and_without_its_head(capsys, run):
    words = ["--set", "eval.finetune.optimizer={type='SGD',lr=0.0}", *FAST, "--set", "eval.finetune.epochs=1"]
    words += ["--set", "eval.train={type='Fraction',share=0.5,source='${data.source}'}"]
    code, _, err = call(capsys, "eval", "finetune", run, *words, "--set", "eval.test=${data.source}")
    assert code == 0 and "all of 2 steps" in err, err  # 40 of 80 images, 16 at a step
    (folder,) = (path for path in (run / "eval").iterdir() if path.is_dir())
    tuned, encoder = checkpoint.load_weights(folder), open_saved(run).backbone
    for name, parameter in encoder.named_parameters():
        assert torch.equal(tuned[f"backbone.{name}"], parameter)
    assert {name for name in tuned if not name.startswith("backbone.")} == {
        "classifier.fc.weight",
        "classifier.fc.bias",
    }


def test_the_same_command_continues(capsys, run, monkeypatch):
    """A run that was stopped and continued ends with the same bits as one that was not stopped."""
    whole = shutil.copytree(run, run.parent / "whole")
    assert call(capsys, "eval", "finetune", whole, *FAST)[0] == 0
    from sslrun import training

    stopped = iter([0, 0, 0, 75])
    monkeypatch.setattr(training.distributed.Vote, "cast", lambda vote, code: next(stopped))
    code, out, err = call(capsys, "eval", "finetune", run, *FAST)
    assert (code, out) == (75, "") and "the same command goes on" in err and not list((run / "eval").glob("*.json"))
    monkeypatch.undo()
    assert call(capsys, "eval", "finetune", run, *FAST)[0] == 0
    weights = [checkpoint.load_weights(next((each / "eval").glob("*/checkpoints"))) for each in (whole, run)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("backbone", [ResNet(18, base_width=4), VisionTransformer("tiny", img_size=32, depth=3)])
def test_layers_decay_from_the_classifier_down(backbone):
    names = [(f"backbone.{name}", p.requires_grad_(True)) for name, p in backbone.named_parameters()]
    head = torch.nn.Linear(2, 2)
    optimizer = AdamW(lr=1.0, layer_decay=0.5).create([*names, ("classifier.fc.weight", head.weight)], backbone)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    if isinstance(backbone, ResNet):
        expected = {
            "conv1.weight": 1 / 32,
            "bn1.bias": 1 / 32,
            "layer1.0.conv1.weight": 1 / 16,
            "layer4.1.bn2.bias": 0.5,
        }
    else:
        expected = {"pos_embed": 1 / 16, "patch_embed.proj.bias": 1 / 16, "blocks.0.mlp.fc1.bias": 1 / 8}
        expected |= {"blocks.2.norm1.weight": 0.5, "norm.weight": 1.0}
    assert {name: rates[f"backbone.{name}"] for name in expected} == expected
    assert rates["classifier.fc.weight"] == 1.0
    assert len(AdamW(lr=1.0).create(names, backbone).param_groups) == 1


def test_its_recipe_is_made_of_the_runs_recipe_and_of_eval():
    values = {
        "seed": 5,
        "engine": {"device": "cpu"},
        "model": {"type": "MoCo", "backbone": {"type": "ResNet", "depth": 18}},
        "data": {
            "source": {"type": "Shapes"},
            "holdout": 0.1,
            "workers_per_gpu": 3,
            "views": [{"transforms": [{"type": "CenterCrop", "size": 8}, {"type": "Normalize", "mean": [1, 2, 3]}]}],
        },
        "eval": {
            "finetune": {"optimizer": {"type": "SGD", "lr": 1.0, "paramwise": [{"match": "bias", "lr_mult": 2.0}]}}
        },
    }
    made = recipe(
        values, Finetune(layer_decay=0.5, mixup=0.8), values["eval"]["finetune"],
        size=(8, 8), num_classes=9, weights="w", work_dir="d",
    )  # fmt: skip
    assert made["model"]["backbone"] == {"type": "ResNet", "depth": 18}
    assert (made["model"]["num_classes"], made["model"]["mixup"], made["seed"]) == (9, 0.8, 5)
    assert made["data"]["source"] == {"type": "Shapes"} and made["data"]["holdout"] == 0.1
    assert made["data"]["views"][0]["transforms"][0] == {"type": "RandomResizedCrop", "size": [8, 8]}
    assert made["data"]["views"][0]["transforms"][-1] == {"type": "Normalize", "mean": [1, 2, 3]}
    assert made["optimizer"]["paramwise"] == [{"match": "bias", "lr_mult": 2.0}]
    assert made["optimizer"]["layer_decay"] == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval.finetune.layer_decay=0"], "layer_decay must be above 0"),
        (["eval.finetune.mixup=-1"], "mixup is -1"),
        (["eval.test={type='Shapes',split='test'}"], "set eval.train too"),
        (["eval.finetune.samples_per_gpu=7"], "is not a multiple of data.samples_per_gpu 7"),
        (["eval.finetune.optimizer={type='SGDD'}"], "there is no 'SGDD'"),
    ],
)
def test_errors_are_one_line(capsys, run, words, message):
    code, out, err = call(capsys, "eval", "finetune", run, *(part for word in words for part in ("--set", word)))
    assert (code, out) == (2, "") and message in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1 and "Traceback" not in err
