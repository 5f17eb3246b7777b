"""Features, and collapse figures against values worked out by hand."""

import math

import pytest
import torch
from torch import nn

import small_run
from sslrun.cli import main
from sslrun.data.batch import Batch
from sslrun.evaluation.collapse import collapse_warning, guessing_warning
from sslrun.evaluation.features import extract


def test_features_are_pooled_and_the_network_comes_back_as_it_was():
    class Doubler(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            assert not self.training
            return [x * 2]

    backbone = Doubler().train()
    images = torch.arange(2 * 3 * 2 * 2, dtype=torch.float32).view(2, 3, 2, 2)
    batches = [Batch([images], torch.arange(2), None), Batch([images[:1]], torch.arange(1), None)]
    features = extract(backbone, batches, torch.device("cpu"))
    torch.testing.assert_close(features, torch.cat([images, images[:1]]).mean((2, 3)) * 2)
    assert backbone.training


def test_collapse_is_said_in_plain_words():
    chance = math.log(1025)
    assert "looks collapsed" in str(collapse_warning(0.02, 5))
    assert collapse_warning(0.02, 0) is None, "untrained networks look collapsed"
    assert collapse_warning(0.6, 5) is None and collapse_warning(None, 5) is None
    assert "does not tell pictures apart" in str(guessing_warning(chance + 0.01, chance, 1))
    assert guessing_warning(chance + 0.01, chance, 0) is None, "early in a run the loss may be above chance"
    assert guessing_warning(chance - 2, chance, 5) is None and guessing_warning(1.0, None, 5) is None


@pytest.mark.parametrize(("told", "code"), [("collapse_warning", 3), ("guessing_warning", 0)])
def test_a_collapse_ends_a_run_that_says_so_and_a_high_loss_does_not(told, code, tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(f"sslrun.train.{told}", lambda *_: "the sentence")
    recipe = small_run.write_recipe(tmp_path, pictures, steps=6)
    for action, expected in (("stop", code), ("warn", 0)):
        run = tmp_path / action
        assert main([str(recipe), "--set", f"monitor.collapse={action}", "--work-dir", str(run)]) == expected
        told_in = "log.txt" if expected == 0 else "state.json"
        assert "the sentence" in (run / "small" / told_in).read_text()
