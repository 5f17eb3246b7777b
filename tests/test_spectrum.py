"""Spread, RankMe, singular values, alignment and uniformity equal values by hand and the papers' formulas."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from sslrun.cli import main
from sslrun.data.loader import Loader
from sslrun.data.order import Sequential
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.transforms import CenterCrop, RandomHorizontalFlip, RandomResizedCrop
from sslrun.data.views import ViewGroup
from sslrun.errors import RunFailed, UsageError
from sslrun.evaluation.frozen_encoder import FrozenEncoder
from sslrun.evaluation.spectrum import Spectrum, alignment, rankme, spectrum, two_views, uniformity
from sslrun.nn import feature_std as nn_feature_std

CPU = torch.device("cpu")


def test_rankme_by_hand():
    """Singular values 4 and 3: shares 4/7 and 3/7, and exp(-(4/7 ln 4/7 + 3/7 ln 3/7)) = exp(0.682908)."""
    turn = torch.tensor([[2.0, -1.0, 2.0], [2.0, 2.0, -1.0], [-1.0, 2.0, 2.0]]) / 3
    features = torch.tensor([[0.0, 4.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]) @ turn
    values, _ = spectrum(features, CPU)
    assert values.tolist() == pytest.approx([4, 3, 0], rel=1e-6) and values[2] == 0
    assert rankme(values) == pytest.approx(math.exp(0.682908), rel=1e-6)
    assert rankme(spectrum(turn, CPU)[0]) == pytest.approx(3), "all directions alike"
    assert rankme(spectrum(torch.ones(9, 4), CPU)[0]) == 1 and rankme(spectrum(torch.zeros(9, 4), CPU)[0]) == 0


def digits() -> torch.Tensor:
    return torch.from_numpy(load_digits().data).float()


@pytest.mark.parametrize("rows", [1797, 20])
def test_singular_values_and_spread_of_digits(rows, monkeypatch):
    """They equal those of an SVD of the features; some pixels are always 0, and 20 rows have a rank of 20."""
    monkeypatch.setattr("sslrun.evaluation.spectrum.PIECE", 64 * 100)
    features = digits()[:rows]
    values, feature_std = spectrum(features, CPU)
    expected = np.linalg.svd(features.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(values[: len(expected)], expected, rtol=1e-6, atol=1e-4)
    rank = np.linalg.matrix_rank(features.numpy())
    assert rank < 64 and (values > 0).sum() == rank and len(values) == 64
    share = expected[:rank] / expected[:rank].sum()
    assert rankme(values) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)
    pooled = nn_feature_std.feature_std(features)
    assert feature_std == pytest.approx(pooled.value(pooled.sums).item(), rel=1e-5)


def test_alignment_and_uniformity_equal_their_formulas(monkeypatch):
    monkeypatch.setattr("sslrun.evaluation.spectrum.PIECE", 300)
    first, second = digits()[:61], digits()[61:122]
    a, b = (F.normalize(x.double(), dim=1) for x in (first, second))
    assert alignment(first, second, CPU) == pytest.approx((a - b).square().sum(1).mean().item(), rel=1e-5)
    pairs = [(i, j) for i in range(61) for j in range(i)]
    kernel = [math.exp(-2 * (a[i] - a[j]).square().sum().item()) for i, j in pairs]
    assert uniformity(first, CPU) == pytest.approx(math.log(sum(kernel) / len(pairs)), rel=1e-5)

    opposite = torch.tensor([[2.0, 0.0], [-1.0, 0.0]])
    assert uniformity(opposite, CPU) == pytest.approx(-8) and alignment(opposite, -opposite, CPU) == pytest.approx(4)
    assert uniformity(opposite.abs(), CPU) == 0 and alignment(opposite, opposite * 3, CPU) == 0


class Pixels(nn.Module):
    """The pixels are the features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def encoder(images, *groups: ViewGroup) -> FrozenEncoder:
    source = ImageFolder(str(images))
    source.open("source")
    return FrozenEncoder(
        backbone=Pixels(), train=source, test=None, transforms=[CenterCrop(8)], views=list(groups), device=CPU,
        bf16=False, augment="exact", num_threads=1, seed=5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "made"),
    [
        ([("flips", 2), ("crops", 4)], [("flips", 2)]),
        ([("flips", 1), ("crops", 1), ("flips", 1)], [("flips", 1), ("crops", 1)]),
        ([("crops", 1)], [("crops", 2)]),
    ],
)
def test_the_two_views_equal_those_of_training(groups, made, images, monkeypatch):
    monkeypatch.setattr("sslrun.evaluation.spectrum.BATCH", 3)
    transforms = {"flips": [CenterCrop(8), RandomHorizontalFlip(0.5)], "crops": [RandomResizedCrop(8)]}

    def views(table: list[tuple[str, int]]) -> list[ViewGroup]:
        return [ViewGroup(num_views=count, transforms=transforms[name]) for name, count in table]

    one = encoder(images, *views(groups))
    ids = np.array([3, 70, 9, 4, 41, 12, 60])
    found = two_views(one, ids)
    loader = Loader(one.train, views(made), sampler=Sequential(80), seed=5, batch_size=7)
    (batch,) = loader.run([(0, ids)])
    first, second = batch.crops()
    assert torch.equal(found[0], first.flatten(1)) and torch.equal(found[1], second.flatten(1))
    assert not torch.equal(first, second)


def test_eval_spectrum(trained, tmp_path, capsys):
    words = ["eval", "spectrum", str(trained), "-o", str(tmp_path), "--set", "eval.spectrum.num_samples=40"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    results = json.loads(path.read_text())["results"]
    names = {"feature_std", "rankme", "uniformity", "alignment"}
    assert {name for name in results if "/" in name} == {f"spectrum/{name}" for name in names}
    assert all(f"spectrum/{name} " in shown for name in names)
    assert results["num_samples"] == 40 and len(results["singular_values"]) == 32
    assert 1 <= results["spectrum/rankme"] <= 32 and 0 < results["spectrum/feature_std"] <= 1
    assert 0 < results["spectrum/alignment"] < 4 and -8 < results["spectrum/uniformity"] < 0
    assert main([*words, "--set", "eval.spectrum.num_pairs=0"]) == 0
    assert "alignment" not in capsys.readouterr().out


def test_wrong_arguments_are_errors(images):
    for name, value in (("num_samples", 1), ("num_pairs", -1)):
        with pytest.raises(UsageError, match=rf"eval\.spectrum\.{name} must be at least"):
            Spectrum(**{name: value})
    broken = encoder(images, ViewGroup(num_views=2, transforms=[RandomResizedCrop(8)]))
    broken.backbone.forward = lambda x: x.flatten(1) / 0
    with pytest.raises(RunFailed, match="not finite"):
        Spectrum().run(broken, None)
    values, feature_std = spectrum(torch.tensor([[1.0, math.nan]]), CPU)
    assert math.isnan(rankme(values)) and math.isnan(feature_std), "a monitor logs what there is to log"
