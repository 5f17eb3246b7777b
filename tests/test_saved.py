"""A trained encoder is read from a run, a checkpoint in it, or a file of weights; anything else is refused."""

import os
import shutil

import pytest
import torch

from small_run import NAME
from sslrun.errors import UsageError
from sslrun.export.publish import publish
from sslrun.runtime import checkpoint
from sslrun.saved import open_saved


def weights_of(path):
    return {
        k.removeprefix("backbone."): v for k, v in checkpoint.load_weights(path).items() if k.startswith("backbone.")
    }


def is_equal(backbone, weights):
    own = backbone.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in own)


def test_a_run_gives_its_newest_checkpoint(trained):
    saved = open_saved(trained)
    assert (saved.name, saved.folder, saved.step) == (NAME, trained, 6)
    assert saved.weights == trained / "checkpoints/step_00000006"
    assert saved.epoch == 6 / 4  # 64 of 80 images, 16 at a step
    assert not saved.backbone.training
    assert is_equal(saved.backbone, weights_of(trained))


def test_a_checkpoint_gives_itself(trained):
    saved = open_saved(trained / "checkpoints/step_00000004")
    assert (saved.step, saved.epoch) == (4, 1)
    assert is_equal(saved.backbone, weights_of(saved.weights))
    assert not is_equal(saved.backbone, weights_of(trained))  # other weights than the newest


def test_a_file_of_weights_needs_its_recipe(trained, tmp_path):
    file = publish(trained, tmp_path)
    with pytest.raises(UsageError, match="set --recipe to their TOML recipe"):
        open_saved(file)
    saved = open_saved(file, recipe=trained / "config.toml")
    assert (saved.folder, saved.step) == (None, None)
    assert is_equal(saved.backbone, weights_of(trained))
    with pytest.raises(UsageError, match=r"does not fit the backbone of .*config.toml: .*size mismatch"):
        open_saved(file, overrides=["model.backbone.base_width=8"], recipe=saved.config.path)


def test_overlays_and_overrides_go_over_the_recipe(trained, tmp_path):
    (tmp_path / "base.toml").write_text("[eval]\ntest = { type = 'Shapes', split = 'train' }\n")
    (tmp_path / "bench.toml").write_text("extends = 'base.toml'\n[eval.test]\nsplit = 'test'\n[log]\ninterval = 7\n")
    saved = open_saved(trained, [tmp_path / "bench.toml"], ["log.interval=9"])
    assert saved.config.values["eval"] == {
        "test": {"type": "Shapes", "split": "test", "root": os.path.abspath("data/shapes")}
    }
    assert (saved.recipe.log.interval, saved.recipe.seed) == (9, 3)


def test_what_is_no_run_is_said_in_a_line(trained, tmp_path):
    alone = shutil.copytree(trained / "checkpoints/step_00000006", tmp_path / "step_00000006")
    for path, words in (
        (tmp_path / "nothing", "nothing does not exist"),
        (tmp_path.parent, "neither a checkpoint nor a run folder"),
        (alone, "is not in a run folder"),
    ):
        with pytest.raises(UsageError, match=words):
            open_saved(path)
    with pytest.raises(UsageError, match="has its own recipe"):
        open_saved(trained, recipe=trained / "config.toml")


def test_weights_of_another_project_are_to_be_imported(trained, tmp_path):
    hint = r"brought in by `sslrun import-weights '.*a b/theirs\.{}' -o NEW.safetensors`"
    folder = tmp_path / "a b"
    folder.mkdir()
    weights = {"conv1.weight": torch.zeros(4, 3, 3, 3)}
    torch.save(weights, folder / "theirs.pth")
    torch.save({"state_dict": weights, "epoch": 3}, folder / "theirs.tar")
    torch.save({f"backbone.encoder.{name}": tensor for name, tensor in weights.items()}, folder / "theirs.2.pth")
    for name, recipe in (
        ("pth", None),
        ("pth", trained / "config.toml"),
        ("2.pth", trained / "config.toml"),
        ("tar", None),
    ):
        with pytest.raises(UsageError, match=hint.format(name)):
            open_saved(folder / f"theirs.{name}", recipe=recipe)
