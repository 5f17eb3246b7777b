"""Feature extraction, evaluations on two ranks, and warnings about collapse."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import small_run
from ranks import run_ranks
from sslrun.cli import main
from sslrun.evaluation.collapse import collapse_warning, guessing_warning, prototype_warning
from sslrun.evaluation.features import FeatureExtractor, evaluating, pooled
from sslrun.evaluation.knn import knn_grid, knn_predict, nearest
from sslrun.evaluation.probe import linear_probe
from sslrun.evaluation.spectrum import alignment, spectrum, uniformity
from sslrun.runtime import distributed


def test_features_are_pooled_and_the_network_is_in_training_mode_again():
    class Doubler(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            assert not self.training
            return [x * 2]

    backbone = Doubler().train()
    images = torch.arange(2 * 3 * 2 * 2, dtype=torch.float32).view(2, 3, 2, 2)
    with evaluating(backbone):
        torch.testing.assert_close(pooled(backbone, images), images.mean((2, 3)) * 2)
    assert backbone.training


def test_each_submodule_gets_its_own_mode_back():
    backbone = nn.Sequential(nn.Identity().eval(), nn.Identity()).train()
    backbone[0].eval()
    with evaluating(backbone):
        assert not any(part.training for part in backbone.modules())
    assert [part.training for part in backbone.modules()] == [True, False, True]


def test_every_rank_calls_the_network_equally_often(monkeypatch):
    """A sharded network would hang otherwise: 257 images on two ranks are batches of 128 and one of 1."""
    calls: list[np.ndarray] = []
    monkeypatch.setattr(FeatureExtractor, "_rows", lambda _, module, ids: calls.append(ids) or torch.from_numpy(ids))
    monkeypatch.setenv("WORLD_SIZE", "2")
    rows = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        rows.append(FeatureExtractor.__new__(FeatureExtractor).extract_share(nn.Identity(), np.arange(257)))
    assert [len(ids) for ids in calls] == [129, 129] and torch.cat(rows).tolist() == list(range(257))


def measured() -> dict[str, Any]:
    """Results of a rank that has only its share of the rows."""
    distributed.init(torch.device("cpu"))
    device, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    labels, truth = torch.arange(301) % 7, torch.arange(99) % 7
    centers = torch.randn(7, 16, generator=generator)
    whole = [centers[each] + 1.8 * torch.randn(len(each), 16, generator=generator) for each in (labels, truth)]
    bank, queries = (rows[distributed.share(len(rows))] for rows in whole)
    one, two = whole[0][:2], whole[1][:1]
    few = [rows[distributed.share(len(rows))] for rows in (one, two)]  # the second rank has no query
    values, feature_std = spectrum(bank, device)
    found = {
        "grid": knn_grid(bank, labels, queries, truth, ks=[1, 20, 500], at_once=5000),
        "predicted": knn_predict(bank, labels, queries, k=20).tolist(),
        "nearest": nearest(bank, queries, 5)[0].tolist(),
        "cosines": nearest(bank, queries, 5)[1],
        "probe": linear_probe(bank, labels, queries, truth, device),
        "few": nearest(*few, 9)[0].tolist(),
        "values": values,
        "others": torch.tensor([feature_std, uniformity(bank, device), alignment(bank, -bank + 1, device)]),
    }
    distributed.shutdown()
    return found


def test_two_ranks_measure_the_same_as_one():
    alone = measured()
    assert 50 < alone["grid"][1]["top1_pct"] < 100 and len(alone["predicted"]) == 99 and len(alone["few"]) == 1
    for found in run_ranks(measured, 2):
        for name, value in alone.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
            else:
                assert found[name] == value, name


def test_warnings_of_collapse_and_guessing():
    chance = math.log(1025)
    assert "looks collapsed" in str(collapse_warning(0.02, 5))
    assert collapse_warning(0.02, 0) is None, "untrained networks look collapsed"
    assert collapse_warning(0.6, 5) is None and collapse_warning(None, 5) is None
    assert "does not tell images apart" in str(guessing_warning(chance + 0.01, chance, 1))
    assert guessing_warning(chance + 0.01, chance, 0) is None, "early in a run the loss may be above chance"
    assert guessing_warning(chance - 2, chance, 5) is None and guessing_warning(1.0, None, 5) is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"largest_prototype_pct": 97.0}, "one prototype takes all"),
        ({"center_size": 3.2}, "the center runs away"),
        ({"loss_of_chance": 0.004}, "the loss is near 0"),
        ({"loss_of_chance": 0.9999}, "the loss is ln K"),
        ({"class_loss_of_chance": 1.0}, "the loss of class tokens is ln K"),
        ({"patch_loss_of_chance": 0.001}, "the loss of patches is near 0"),
    ],
)
def test_signs_of_a_collapse_of_prototypes(changed, words):
    healthy = {"largest_prototype_pct": 4.0, "center_size": 0.3, "class_loss_of_chance": 0.6, "feature_std": 0.9}
    assert prototype_warning(healthy, 3) is None
    assert words in str(prototype_warning(healthy | changed, 3))
    assert prototype_warning(healthy | changed, 0) is None, "untrained networks look like that"
    assert prototype_warning({"loss_of_chance": 0.001}, 3) is None, "another kind of method"


@pytest.mark.parametrize(
    ("warning", "action", "code"),
    [
        ("collapse_warning", "stop", 3),
        ("collapse_warning", "warn", 0),
        ("guessing_warning", "stop", 0),
        ("prototype_warning", "stop", 0),
    ],
)
def test_a_collapse_ends_a_run_with_collapse_stop_and_a_high_loss_does_not(
    warning, action, code, tmp_path, images, monkeypatch
):
    monkeypatch.setattr(f"sslrun.training.{warning}", lambda *_: "the sentence")
    recipe = small_run.write_recipe(tmp_path, images, steps=3)
    assert main([str(recipe), "--set", f"monitor.collapse={action}"]) == code
    file = "log.txt" if code == 0 else "state.json"
    assert "the sentence" in (tmp_path / "runs/small" / file).read_text()
