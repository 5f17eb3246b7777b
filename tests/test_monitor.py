"""Monitors: when they are due, that their numbers are right, and that they do not affect the training."""

import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import small_run
from sslrun.cli import main
from sslrun.contract import Progress
from sslrun.errors import UsageError
from sslrun.evaluation.features import FeatureExtractor
from sslrun.evaluation.frozen_encoder import labels
from sslrun.evaluation.knn import knn_top1
from sslrun.evaluation.monitors.config import MonitorConfig
from sslrun.evaluation.monitors.feature_spectrum import FeatureSpectrum
from sslrun.evaluation.monitors.held_out_loss import HeldOutLoss, untouched
from sslrun.evaluation.monitors.knn_accuracy import KnnAccuracy
from sslrun.evaluation.monitors.linear_probe import LinearProbe
from sslrun.evaluation.monitors.monitor import Monitor, Snapshot
from sslrun.evaluation.monitors.monitors import Monitors
from sslrun.evaluation.probe import fit, linear_probe
from sslrun.evaluation.spectrum import rankme, spectrum
from sslrun.measure import frozen_encoder
from sslrun.saved import open_saved

CPU = torch.device("cpu")
INTERVALS = ("loss_interval", "knn_interval", "probe_interval", "rankme_interval")
BUILT_IN = ("val/", "knn/", "probe/", "spectrum/")
MEASURED = (*BUILT_IN, "drawing/")  # the last by a monitor of these tests
SIMSIAM = """
[model]
type = "SimSiam"
backbone = { type = "ResNet", depth = 18, base_width = 4, stem = "small" }
neck = { type = "NonLinearNeck", in_channels = 32, hid_channels = 16, out_channels = 16 }

[model.head]
type = "LatentPredictHead"
predictor = { type = "NonLinearNeck", in_channels = 16, hid_channels = 8, out_channels = 16 }

"""


class Drawing(Monitor):
    """A user's own monitor, which draws random numbers."""

    def measure(self, snapshot: Snapshot) -> dict[str, float]:
        return {"drawing/value": torch.rand(()).item(), "drawing/has_gradient": float(torch.is_grad_enabled())}


class NearestMean(Monitor):
    """A user's own monitor, which reads all features and labels on every rank."""

    needs_held_out = needs_labels = True

    def measure(self, snapshot: Snapshot) -> dict[str, float]:
        train, test = snapshot.training, snapshot.held_out
        means = torch.stack([train.features[train.labels == label].mean(0) for label in train.labels.unique()])
        distances = torch.cdist(test.features, means)
        return {"mean/distance": distances.mean().item(), "mean/of_own": distances[:, test.labels].mean().item()}


OWN = ["custom_imports=['test_monitor']", "monitor.extra=[{type='Drawing'}]"]


def run(recipe: Path, work_dir: Path, *options: str) -> list[dict[str, Any]]:
    """The rows of one training in this process."""
    words = [str(recipe), "--work-dir", str(work_dir), *(f"--set={option}" for option in options)]
    assert main(words) == 0
    return small_run.metrics(work_dir / "small")


def all_every(interval: int) -> list[str]:
    return [f"monitor.{name}={interval}" for name in INTERVALS]


def training(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without measurements."""
    return [row for row in small_run.timeless(rows) if not any(key.startswith(MEASURED) for key in row)]


@pytest.fixture
def simsiam(tmp_path, images):
    """A recipe of a method whose loss depends only on weights and images."""
    return small_run.write_recipe(tmp_path, images, steps=5, model=SIMSIAM)


def test_a_users_monitor_that_does_not_call_super_is_due_after_every_epoch():
    class Alone(Monitor):
        def __init__(self, margin: float = 1.0) -> None:
            self.margin = margin

    assert {key: each.interval for key, each in MonitorConfig(extra=[Alone()]).monitors().items()} == {
        "extra.0.interval": 1
    }


def test_held_out_loss_equals_the_training_loss_on_the_same_images(tmp_path, images, simsiam):
    """The held-out images are the training images in the order of epoch 0, and the learning rate is 0.

    80 images are 5 batches of 16, each of two BatchNorm groups, in one micro-batch or in two.
    """
    same = f'holdout = {{ type = "ImageFolder", data_prefix = "{images}" }}'
    simsiam.write_text(simsiam.read_text().replace("holdout = 0.2", same))
    standing = ["optimizer.lr=0.0", "log.interval=1", "monitor.knn_interval=0", "monitor.loss_interval=1"]
    standing.append("engine.split_sync_bn=true")
    for micro_batch in (16, 8):
        rows = run(simsiam, tmp_path / str(micro_batch), *standing, f"engine.micro_batch={micro_batch}")
        before, *steps, after = rows
        losses = [row["train/loss"] for row in steps]
        assert (before["step"], len(losses), after["step"]) == (0, 5, 5)
        assert before["val/loss"] == pytest.approx(sum(losses) / 5, rel=1e-6)
        assert before["val/feature_std"] == pytest.approx(sum(row["train/feature_std"] for row in steps) / 5, rel=1e-6)
        assert after["val/loss"] == before["val/loss"], "the same images in the same crops"
        assert max(losses) - min(losses) > 1e-4, "or any mean would do"


@pytest.mark.nightly
def test_training_has_the_same_bits_with_and_without_monitors(tmp_path, images):
    """All of the checkpoint: queue, statistics, optimizer; also on two ranks with sharded parameters."""
    recipe = small_run.write_recipe(tmp_path, images, steps=5)
    first = []
    for ranks in (1, 2):
        measured, plain = tmp_path / f"{ranks}/with/small", tmp_path / f"{ranks}/without/small"
        for where, interval in ((measured, 1), (plain, 0)):
            options = [f"--set={option}" for option in (*all_every(interval), "engine.zero_stage=3")]
            small_run.train(recipe, f"--work-dir={where.parent}", *options, ranks=ranks)
        for step in (4, 5):
            assert small_run.differences(*(each / f"checkpoints/step_{step:08d}" for each in (measured, plain))) == []
        rows = small_run.timeless(small_run.metrics(measured))
        assert training(rows) == small_run.timeless(small_run.metrics(plain)) and training(rows) != rows
        found = {row["step"]: row for row in rows if "val/loss" in row}
        assert list(found) == [0, 4, 5] and all(any(key.startswith(kind) for key in found[4]) for kind in BUILT_IN)
        for name in ("val/loss", "spectrum/rankme"):
            assert len({row[name] for row in found.values()}) == 3
        first.append(found[0])
    assert first[0] == pytest.approx(first[1], rel=1e-4), "two ranks measure what one does"


def test_a_resume_with_other_monitors_ends_with_the_same_bits(tmp_path, images):
    recipe = small_run.write_recipe(tmp_path, images, steps=9)
    straight = run(recipe, tmp_path / "straight", *all_every(0))
    run(recipe, tmp_path / "resumed", *all_every(3), "monitor.by=iter")
    for step in (8, 9):
        shutil.rmtree(tmp_path / f"resumed/small/checkpoints/step_{step:08d}")
    words = [str(recipe), "--work-dir", str(tmp_path / "resumed"), "--resume"]
    assert main([*words, *(f"--set={option}" for option in (*all_every(1), *OWN))]) == 0
    last = "small/checkpoints/step_00000009"
    assert small_run.differences(tmp_path / "straight" / last, tmp_path / "resumed" / last) == []
    rows = small_run.metrics(tmp_path / "resumed/small")
    assert training(rows) == small_run.timeless(straight)
    assert [row["step"] for row in rows if "probe/loss" in row] == [0, 3, 8, 9]
    assert [row["step"] for row in rows if "drawing/value" in row] == [8, 9], "a user's monitor, from then on"


def test_when_a_monitor_is_due():
    def steps(config: MonitorConfig, total: int = 11) -> list[int]:
        interval = config.loss_interval
        return [step for step in range(total + 1) if config.is_due(interval, Progress(step, total, 4, seed=0))]

    assert steps(MonitorConfig(loss_interval=1)) == [0, 4, 8, 11]
    assert steps(MonitorConfig(loss_interval=2)) == [0, 8, 11]
    assert steps(MonitorConfig(loss_interval=9)) == [0, 11]
    assert steps(MonitorConfig(loss_interval=3, by="iter")) == [0, 3, 6, 9, 11]
    assert steps(MonitorConfig(knn_interval=1)) == []
    for name in INTERVALS:
        with pytest.raises(UsageError, match=rf"monitor\.{name} must be at least 0, not -1"):
            MonitorConfig(**{name: -1})


def test_each_monitor_has_its_own_interval(tmp_path, images, monkeypatch):
    """A row has the numbers of the monitors that are due, and none of them changes global random state."""
    for kind in (HeldOutLoss, KnnAccuracy, LinearProbe, FeatureSpectrum):

        def measure(self: Any, *arguments: Any, measure: Any = kind.measure) -> dict[str, float]:
            before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1:]
            found = measure(self, *arguments)
            after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1:]
            assert torch.equal(before[0], after[0]) and before[1] == after[1]
            assert np.array_equal(before[2][0], after[2][0]) and before[2][1:] == after[2][1:]
            return found

        monkeypatch.setattr(kind, "measure", measure)
    recipe = small_run.write_recipe(tmp_path, images, steps=7)
    each = [f"monitor.{name}={interval}" for name, interval in zip(INTERVALS, (3, 2, 5, 6), strict=True)]
    rows = run(recipe, tmp_path, "monitor.by=iter", *each, "log.interval=9")
    names = {"val", "knn", "probe", "spectrum"}
    seen = {row["step"]: {key.split("/")[0] for key in row} & names for row in rows if "train/loss" not in row}
    alone = {2: {"knn"}, 3: {"val"}, 4: {"knn"}, 5: {"probe"}}
    assert seen == {0: names, **alone, 6: {"val", "knn", "spectrum"}, 7: names}
    assert rows[0].keys() >= {"val/loss", "val/top1_pct", "val/feature_std"}
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_logged_numbers_equal_those_of_the_saved_encoder(tmp_path, images):
    recipe = small_run.write_recipe(tmp_path, images, steps=2)
    few = ["monitor.knn_bank=40", "monitor.knn_k=5"]
    last = run(recipe, tmp_path, *all_every(1), *few)[-1]
    encoder = frozen_encoder(open_saved(tmp_path / "small"), CPU)
    train, test = encoder.labeled()
    assert (len(train), len(test)) == (64, 16)
    ids = np.array([i * 63 // 39 for i in range(40)])
    bank = encoder.extractor(train).extract_share(encoder.backbone, ids)
    queries = encoder.extractor(test).extract_share(encoder.backbone, np.arange(16))
    labeled = bank, labels(train)[ids], queries, labels(test)
    values, feature_std = spectrum(bank, CPU)
    expected = {"spectrum/rankme": rankme(values), "spectrum/feature_std": feature_std}
    expected |= {"knn/top1_pct": knn_top1(*labeled, k=5), **linear_probe(*labeled, CPU)}
    assert {name: last[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_features_are_extracted_once_for_all_monitors_that_are_due(tmp_path, images, monkeypatch):
    extracted: list[tuple[int, int]] = []
    extract_share = FeatureExtractor.extract_share

    def counted(self: FeatureExtractor, module: nn.Module, ids: np.ndarray) -> torch.Tensor:
        extracted.append((len(self.source), len(ids)))
        return extract_share(self, module, ids)

    monkeypatch.setattr(FeatureExtractor, "extract_share", counted)
    recipe = small_run.write_recipe(tmp_path, images, steps=1)
    run(recipe, tmp_path, *all_every(1), *OWN, "monitor.knn_bank=30")
    assert sorted(extracted) == [(16, 16)] * 2 + [(64, 30)] * 2, "before and after the only step"


def test_a_users_monitor_gives_the_same_numbers_on_two_ranks(tmp_path, images):
    recipe = small_run.write_recipe(tmp_path, images, steps=1)
    options = ["custom_imports=['test_monitor']", "monitor.extra=[{type='NearestMean'}]", "monitor.knn_bank=31"]
    first = []
    for ranks in (1, 2):
        words = [f"--work-dir={tmp_path / str(ranks)}", *(f"--set={option}" for option in options)]
        small_run.train(recipe, *words, ranks=ranks)
        first.append(next(row for row in small_run.metrics(tmp_path / str(ranks) / "small") if "mean/distance" in row))
    for name in ("mean/distance", "mean/of_own"):
        assert first[0][name] == pytest.approx(first[1][name], rel=1e-5)


def test_random_draws_of_a_users_monitor_do_not_affect_the_training(tmp_path, images, monkeypatch):
    measure = Monitors.measure

    def watched(self: Monitors, *arguments: Any) -> dict[str, float]:
        before = torch.get_rng_state()
        measured = measure(self, *arguments)
        assert torch.equal(torch.get_rng_state(), before)
        return measured

    monkeypatch.setattr(Monitors, "measure", watched)
    rows = run(small_run.write_recipe(tmp_path, images, steps=5), tmp_path, *OWN)
    assert [row["step"] for row in rows if row.get("drawing/has_gradient") == 0] == [0, 4, 5]
    assert all(0 <= row["drawing/value"] < 1 for row in rows if "drawing/value" in row)


@pytest.mark.parametrize("weight_decay", [1e-3, 1e-2])
def test_the_probe_equals_scikit_learns_logistic_regression_on_digits(weight_decay):
    """On features with means far from 0 and unequal standard deviations, some of them 0."""
    pixels, truth = load_digits(return_X_y=True)
    features, classes = torch.from_numpy(pixels).float() * torch.arange(64) + 50, torch.from_numpy(truth)
    reference = LogisticRegression(C=1 / (1200 * weight_decay), max_iter=1000, tol=1e-6)
    reference = make_pipeline(StandardScaler(), reference).fit(features[:1200].double().numpy(), truth[:1200])
    weight, bias = fit(features[:1200], classes[:1200], 10, weight_decay)
    logits = features[1200:] @ weight.T + bias
    expected = torch.from_numpy(reference.predict_log_proba(features[1200:].double().numpy()))
    accuracy, its = ((each.argmax(1) == classes[1200:]).double().mean().item() for each in (logits, expected))
    assert accuracy == pytest.approx(its, abs=0.005) and accuracy > 0.9
    loss, its = (nn.functional.cross_entropy(each.double(), classes[1200:]).item() for each in (logits, expected))
    assert loss == pytest.approx(its, rel=0.02)


def test_the_accuracy_of_the_probe():
    """Two linearly separable classes, and three of ten queries on the wrong side."""
    side = torch.tensor([1.0, -1.0]).repeat(20)
    bank = torch.stack([side, torch.linspace(-1, 1, 40)], 1)
    truth = (side < 0).long()
    queries, wrong = bank[:10], truth[:10].clone()
    wrong[:3] = 1 - wrong[:3]
    assert linear_probe(bank, truth, queries, truth[:10], CPU)["probe/top1_pct"] == 100
    result = linear_probe(bank, truth, queries, wrong, CPU)
    assert result["probe/top1_pct"] == pytest.approx(70) and result["probe/loss"] > 0.5


def test_fewer_held_out_images_than_a_batch_are_reported(tmp_path, images, capsys):
    recipe = small_run.write_recipe(tmp_path, images, steps=1)
    rows = run(recipe, tmp_path, "data.holdout=0.1", "monitor.loss_interval=1")
    assert "the 8 held-out images do not fill a global batch of 16" in capsys.readouterr().err
    assert math.isfinite(rows[0]["val/loss"])


def test_without_held_out_images_only_rankme_is_measured_with_a_warning(tmp_path, images, capsys):
    flat = tmp_path / "flat"
    shutil.copytree(images / "class_0", flat)
    recipe = small_run.write_recipe(tmp_path, flat, steps=1)
    recipe.write_text(recipe.read_text().replace("holdout = 0.2\n", ""))
    rows = run(recipe, tmp_path, *all_every(1))
    said = "loss_interval, knn_interval, probe_interval: there are no held-out images (data.holdout) to measure"
    assert said in capsys.readouterr().err
    assert {key for row in rows for key in row if key.startswith(MEASURED)} == {
        "spectrum/rankme",
        "spectrum/feature_std",
    }
    assert all(1 < row["spectrum/rankme"] < 20 for row in rows if "spectrum/rankme" in row)


def test_what_needs_labels_is_left_out_of_a_run_without_them(tmp_path, images, capsys):
    shutil.copytree(images / "class_0", tmp_path / "flat")
    recipe = small_run.write_recipe(tmp_path, tmp_path / "flat", steps=1)
    rows = run(recipe, tmp_path, "monitor.probe_interval=1", "monitor.rankme_interval=1")
    assert "[monitor] knn_interval, probe_interval: left out, since " in capsys.readouterr().err
    measured = {key for row in rows for key in row if key.startswith(MEASURED)}
    assert measured == {"spectrum/rankme", "spectrum/feature_std"}


@pytest.mark.parametrize("name", ["npid", "odc", "deepcluster"])
def test_a_method_that_remembers_samples_has_no_held_out_loss(name, capsys):
    recipe = small_run.ROOT / f"configs/learn/{name}.toml"
    assert main([str(recipe), "--set", "monitor.loss_interval=1", "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "monitor.loss_interval" in lines[0] and "set it to 0" in lines[0]


@pytest.mark.parametrize(
    ("monitor", "method", "message"),
    [
        ("LabelAccuracy", "mocov2", "monitor.extra.0.interval is set, but MoCo does not learn from labels"),
        ("HeldOutLoss", "npid", "monitor.extra.0.interval is set, but NPID has no loss on images"),
    ],
)
def test_a_monitor_that_does_not_suit_the_method_is_an_error_of_one_line(monitor, method, message, capsys):
    recipe = small_run.ROOT / ("configs/quickstart.toml" if method == "mocov2" else f"configs/learn/{method}.toml")
    assert main([str(recipe), f"--set=monitor.extra=[{{type='{monitor}'}}]", "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


class Restless(nn.Module):
    """Changes buffers and draws random numbers in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("center", torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.center = self.center * 0.9 + x.mean(0)
        self.count += 1
        return self.norm(nn.functional.dropout(x, 0.5)).sum()


def test_untouched_restores_buffers_and_random_state():
    module = Restless()
    buffers, values = dict(module.named_buffers()), {n: b.clone() for n, b in module.named_buffers()}
    state = torch.get_rng_state()
    with untouched(module, CPU):
        loss = module(torch.ones(4, 3))
        assert module.count == 1 and module.center.sum() == 3 and module.norm.num_batches_tracked == 1
    assert not loss.requires_grad and torch.equal(torch.get_rng_state(), state)
    assert all(module.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert all(torch.equal(buffer, values[name]) for name, buffer in buffers.items())
    with pytest.raises(KeyboardInterrupt), untouched(module, CPU):
        module(torch.ones(4, 3))
        raise KeyboardInterrupt
    assert all(torch.equal(buffer, values[name]) for name, buffer in buffers.items()), "a stop undoes it too"
