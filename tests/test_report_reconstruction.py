"""The report's predicted pixels: hidden patches are the method's, visible ones those of the image."""

from pathlib import Path

import numpy as np
import pytest
import torch

from small_run import call
from sslrun.config import load
from sslrun.data.masks import masks_of
from sslrun.recipe import Recipe
from sslrun.report.encoder_outputs import run_encoder
from sslrun.report.page import write_report
from sslrun.report.reconstruction import predictions, reconstructions

LEARN = Path(__file__).parents[1] / "configs/learn"
TINY = ["model.backbone.depth=1", "model.backbone.embed_dim=24", "model.backbone.num_heads=2"]
TINY_DECODER = ["model.decoder.in_channels=24", "model.decoder.embed_dim=8", "model.decoder.num_heads=2"]


def settings(name: str) -> list[str]:
    return TINY + (TINY_DECODER if name == "mae" else [])


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_visible_patches_are_kept_and_hidden_ones_predicted(name: str) -> None:
    recipe = load(LEARN / f"{name}.toml", settings(name)).build(Recipe)
    method, group = recipe.model.eval(), recipe.data.views[0]
    pixels = torch.randint(0, 256, (3, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (hidden,) = masks_of([group], 0, 0, np.arange(3))
    assert hidden is not None
    made = predictions(method, pixels, hidden, group)
    side = 40 // hidden.shape[1]
    is_hidden = hidden.repeat(side, 1).repeat(side, 2)
    assert np.array_equal(made[~is_hidden], pixels.numpy()[~is_hidden])
    assert (made[is_hidden] != pixels.numpy()[is_hidden]).any(axis=-1).mean() > 0.9
    # Other pixels below the mask change a prediction through the normalization of MAE's patches alone.
    other = torch.where(torch.from_numpy(is_hidden).unsqueeze(-1), 255 - pixels, pixels)
    assert np.array_equal(predictions(method, other, hidden, group), made) == (name == "simmim")


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["mae", "simmim", "maskfeat"])
def test_a_report_shows_them(tmp_path, images, capsys, name) -> None:
    sets = [*settings(name), "max_iters=2", "global_batch=16", "data.samples_per_gpu=16", "data.holdout=0.2"]
    recipe = tmp_path / f"{name}.toml"
    recipe.write_text(
        f'extends = "{LEARN / name}.toml"\n_delete_ = ["epochs"]\n[data]\n_delete_ = ["source", "holdout"]\n'
        f'source = {{ type = "ImageFolder", data_prefix = "{images}" }}\nholdout = 0.2\n'
    )
    words = [f"--set={each}" for each in (*sets, "monitor={knn_interval=0}", "log.interval=1")]
    code, _, err = call(capsys, recipe, f"--work-dir={tmp_path}", *words)
    assert code == 0, err
    page = write_report([tmp_path / name]).read_text()
    assert ("Predicted pixels" in page) == (name != "maskfeat")
    shown = reconstructions(run_encoder(tmp_path / name))
    assert len(shown) == (0 if name == "maskfeat" else 2)
    assert ("normalized patches" in page) == (name == "mae")
