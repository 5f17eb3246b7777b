"""Linear evaluation: each head equals one trained alone by torch; accuracy is scikit-learn's; the encoder is frozen."""

import itertools
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

import small_run
from ranks import run_ranks
from sslrun.cli import main
from sslrun.config import load
from sslrun.config.schema_reader import schema_of_parts
from sslrun.data.sources import Source
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.sources.subset import Subset
from sslrun.data.transforms import CenterCrop, Normalize, RandomHorizontalFlip, RandomResizedCrop, Transform
from sslrun.errors import RunFailed, UsageError
from sslrun.evaluation import linear, partial_result
from sslrun.evaluation.eval_config import EvalConfig
from sslrun.evaluation.feature_cache import FeatureCache, Normalization
from sslrun.evaluation.frozen_encoder import FrozenEncoder
from sslrun.evaluation.linear import Linear, LinearGrid
from sslrun.evaluation.linear_heads import Heads, Scores, Setting
from sslrun.evaluation.partial_result import PartialResult
from sslrun.nn.norm import BN
from sslrun.nn.resnet import ResNet
from sslrun.optim import Optimizer, lars
from sslrun.optim.optimizers import LARS, SGD
from sslrun.runtime import distributed

CPU = torch.device("cpu")
AS_THEY_ARE: list[Transform] = [CenterCrop(8), Normalize(mean=(0, 0, 0), std=(1, 1, 1))]
SETTINGS = [Setting(lr, decay) for lr, decay in itertools.product((0.03, 0.3, 3.0), (0.0, 0.1))]


class Pixels(nn.Module):
    """The pixels are the features."""

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images[:, 0].flatten(1)]


def small_resnet() -> ResNet:
    torch.manual_seed(1)
    return ResNet(18, stem="small", base_width=16, out_indices=[3], norm_cfg=BN())


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels as files; every third is for testing."""
    root = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for number, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
        folder = root / ("test" if number % 3 == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((15 * pixels).astype(np.uint8)).convert("RGB").save(folder / f"{number:04d}.png")
    return root


def opened(folder: Path, *keep: slice) -> Source:
    source = ImageFolder(str(folder))
    source.open()
    return Subset(source, np.arange(len(source))[keep[0]]) if keep else source


def encoder_of(train: Source, test: Source | None, backbone: nn.Module | None = None, seed: int = 0) -> FrozenEncoder:
    return FrozenEncoder(
        backbone=backbone or Pixels(),
        train=train,
        test=test,
        transforms=AS_THEY_ARE,
        views=[],
        device=CPU,
        bf16=False,
        augment="auto",
        num_threads=1,
        seed=seed,
    )


def arrays(encoder: FrozenEncoder) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training features and labels, test features and labels."""
    assert encoder.test is not None
    sources = (encoder.train, encoder.test)
    features = [encoder.extractor(s).extract(encoder.backbone, np.arange(len(s))).numpy() for s in sources]
    return features[0], sources[0].labels, features[1], sources[1].labels


def some_features(count: int, width: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=generator)
    centers = torch.randn(classes, width, generator=generator)
    return centers[labels] + torch.randn(count, width, generator=generator), labels


def longhand(
    setting: Setting, rule: Optimizer, features: torch.Tensor, labels: torch.Tensor, first: Heads
) -> nn.Linear:
    """One classifier trained with autograd and its own optimizer: ten steps of 16 rows, the rate halved after five."""
    classes, width = first.weight.shape[1:]
    alone = nn.Linear(width, classes)
    with torch.no_grad():
        alone.weight.copy_(first.weight[0])
        alone.bias.zero_()
    groups = [{"params": [alone.weight], "weight_decay": setting.weight_decay}, {"params": [alone.bias]}]
    if isinstance(rule, LARS):
        optimizer = lars.LARS(groups, lr=setting.lr, momentum=rule.momentum, eta=rule.eta, eps=rule.eps)
    else:
        optimizer = torch.optim.SGD(groups, lr=setting.lr, momentum=rule.momentum, nesterov=rule.nesterov)
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * (1 if step < 5 else 0.5)
        optimizer.zero_grad()
        batch = slice(16 * step, 16 * step + 16)
        F.cross_entropy(alone(features[batch]), labels[batch]).backward()
        optimizer.step()
    return alone


RULES = [
    SGD(lr=1.0, momentum=0.9),
    SGD(lr=1.0, momentum=0.9, nesterov=True),
    SGD(lr=1.0),
    LARS(lr=1.0, momentum=0.9, eta=0.02),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}-{rule.options()}")
def test_heads_trained_together_equal_heads_trained_alone(rule):
    features, labels = some_features(160, 12, 7)

    def trained(settings):
        heads = Heads(settings, rule, 12, 7, seed=3, device=CPU)
        for step in range(10):
            batch = slice(16 * step, 16 * step + 16)
            rates = torch.tensor([s.lr * (1 if step < 5 else 0.5) for s in settings])
            heads.step(features[batch], labels[batch], 16, rates)
        return heads

    together, first = trained(SETTINGS), Heads(SETTINGS[:1], rule, 12, 7, seed=3, device=CPU)
    for place, setting in enumerate(SETTINGS):
        single, by_torch = trained([setting]), longhand(setting, rule, features, labels, first)
        torch.testing.assert_close(together.weight[place], single.weight[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(single.weight[0], by_torch.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(single.bias[0, :, 0], by_torch.bias, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together.weight[4], together.weight[5], atol=1e-4), "weight decay does something"


def test_a_diverged_head_is_never_correct_and_does_not_affect_others():
    features, labels = some_features(64, 6, 3)
    rule = SGD(lr=1.0, momentum=0.9)
    heads, alone = (
        Heads([Setting(lr, 1e-3) for lr in rates], rule, 6, 3, seed=0, device=CPU) for rates in ([0.1, 1e30], [0.1])
    )
    for _ in range(20):
        heads.step(features, labels, 64, torch.tensor([0.1, 1e30]))
        loss = alone.step(features, labels, 64, torch.tensor([0.1]))
    torch.testing.assert_close(heads.weight[0], alone.weight[0])
    scores = heads.score([(features, labels)])
    assert scores.top1_pct[0] > 60 and scores.top1_pct[1] == 0
    assert loss < math.log(3) and not scores.loss[1].isfinite()


def test_scores_equal_those_by_hand():
    features, labels = some_features(50, 6, 7)
    heads = Heads(SETTINGS[:2], SGD(lr=1.0), 6, 9, seed=0, device=CPU)
    heads.step(features, labels, 50, torch.tensor([0.5, 3.0]))
    scores = heads.score([(features[:33], labels[:33]), (features[33:], labels[33:])])
    for place in range(2):
        logits = features @ heads.weight[place].T + heads.bias[place, :, 0]
        order = logits.argsort(dim=1, descending=True)
        hits = order[:, :5] == labels[:, None]
        assert scores.top1_pct[place].item() == pytest.approx(100 * hits[:, 0].double().mean().item())
        assert scores.top5_pct[place].item() == pytest.approx(100 * hits.any(1).double().mean().item())
        assert scores.loss[place].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        of_class_2 = hits[labels == 2, 0].double().mean().item()
        assert scores.per_class_pct[place, 2].item() == pytest.approx(100 * of_class_2)
    assert scores.per_class_pct[:, 7:].isnan().all()


def test_normalization_equals_torchs_and_scikit_learns():
    features, labels = some_features(96, 5, 3)
    features[:, 4] = 7.3
    ours, theirs = Normalization("batch", 5, CPU), nn.BatchNorm1d(5, eps=1e-6, affine=False)
    for batch in features.split(32):
        torch.testing.assert_close(ours.train(batch)[:, :4], theirs(batch)[:, :4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(features)[:, :4], theirs.eval()(features)[:, :4], rtol=1e-4, atol=1e-4)
    standard = Normalization("standardize", 5, CPU)
    standard.fit(iter([(features[:40], labels), (features[40:], labels)]))
    expected = StandardScaler().fit_transform(features.double().numpy())
    np.testing.assert_allclose(standard(features)[:, :4], expected[:, :4], rtol=1e-4, atol=1e-5)
    assert not standard(features)[:, 4].any()
    assert Normalization("none", 5, CPU)(features) is features


def test_the_setting_is_chosen_by_top1_with_many_images_and_by_loss_with_few():
    scores = Scores(torch.tensor([0.30, 0.20, 0.10]), torch.tensor([91.0, 90.0, 80.0]), *torch.zeros(2, 3))
    assert linear._best(scores, 10**6) == 0
    assert linear._best(scores, 400) == 1
    assert linear._best(scores, 5) == 2
    nothing = scores._replace(loss=torch.full((3,), math.nan))
    assert linear._best(nothing, 5) == 0


@pytest.mark.parametrize("backbone", [Pixels, pytest.param(small_resnet, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("c", [0.1, 1.0])
def test_accuracy_equals_that_of_logistic_regression(digits, backbone, c):
    """With a weight decay of 1 / (C N) it is the same problem and has the same solution."""
    encoder = encoder_of(opened(digits / "train"), opened(digits / "test"), backbone().eval())
    train, train_labels, test, test_labels = arrays(encoder)
    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)
    rate, epochs = (1.0, 200) if backbone is Pixels else (0.3, 1000)  # random features are highly correlated
    rule = SGD(lr=rate, momentum=0.9, weight_decay=1 / (c * len(train)))
    found = Linear(optimizer=rule, norm="standardize", epochs=epochs).run(encoder)
    model = LogisticRegression(C=c, tol=1e-6, max_iter=5000).fit(train, train_labels)
    assert found["linear/top1_pct"] == pytest.approx(100 * model.score(test, test_labels), abs=0.5)
    logits = torch.from_numpy(model.decision_function(train))
    theirs = F.cross_entropy(logits, torch.from_numpy(train_labels)).item()
    assert found["chosen"]["train_loss"] == pytest.approx(theirs, rel=0.03)


def few(digits: Path, backbone: nn.Module | None = None) -> FrozenEncoder:
    """240 digits to learn from, 120 to test on."""
    train, test = opened(digits / "train", slice(0, None, 5)), opened(digits / "test", slice(0, None, 5))
    return encoder_of(train, test, backbone)


def test_the_default_grid_does_not_use_test_images_for_its_choice(digits):
    config = Linear(epochs=30)
    found = config.run(few(digits))
    assert len(found["grid"]) == 40 and found["chosen"]["validation_samples"] == 24
    assert found["chosen"]["train_samples"] == 240, "trained again, on all"
    assert found["linear/top1_pct"] > max(row["test_top1_pct"] for row in found["grid"]) - 5
    assert found["linear/top5_pct"] > 95 and len(found["per_class_top1_pct"]) == 10
    encoder = few(digits)
    encoder.test.labels[:] = encoder.test.labels[::-1].copy()
    other = config.run(encoder)
    assert other["chosen"] == found["chosen"]
    assert other["linear/top1_pct"] < found["linear/top1_pct"] - 50
    for row, before in zip(other["grid"], found["grid"], strict=True):
        assert {**row, "test_top1_pct": None} == {**before, "test_top1_pct": None}


FRESH: list[Transform] = [RandomResizedCrop(8, scale=(0.5, 1.0)), RandomHorizontalFlip(), *AS_THEY_ARE]


def test_fresh_features_equal_cached_ones_unless_crops_are_random(digits):
    rule = SGD(lr=0.3, momentum=0.9)
    configs = [
        Linear(optimizer=rule, norm=norm, epochs=3, global_batch=100, transforms=transforms)
        for norm in ("none", "batch")
        for transforms in (None, AS_THEY_ARE, FRESH)
    ]
    found = [config.run(few(digits)) for config in configs]
    for cached, fresh, random in (found[:3], found[3:]):
        assert [each["features"]["extracted"] for each in (cached, fresh)] == ["once", "every epoch"]
        assert fresh["chosen"]["train_loss"] == pytest.approx(cached["chosen"]["train_loss"], rel=1e-5)
        assert fresh["linear/top1_pct"] == cached["linear/top1_pct"]
        assert random["chosen"]["train_loss"] != pytest.approx(cached["chosen"]["train_loss"], rel=0.02)
    again = configs[2].run(few(digits))
    assert again == found[2], "crops are a function of the seed"


def test_the_encoder_does_not_change(digits):
    backbone = small_resnet().train()
    backbone.layer1.eval()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    encoder = few(digits, backbone)
    for transforms in (None, FRESH):
        Linear(optimizer=SGD(lr=0.1), epochs=1, transforms=transforms).run(encoder)
    after = backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert backbone.training and backbone.layer2.training and not backbone.layer1.training
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_features_larger_than_the_memory_limit_go_into_a_file(digits, tmp_path, monkeypatch):
    encoder = few(digits)
    extractor = encoder.extractor(encoder.train)
    room = 240 * 64 * 2 / 2**30
    whole, halved, filed = (
        FeatureCache(extractor, encoder.backbone, memory_gib=gib, folder=str(tmp_path)) for gib in (1.0, room, room / 2)
    )
    assert [cache.rows.dtype for cache in (whole, halved, filed)] == [torch.float32, torch.float16, torch.float16]
    ids = np.array([3, 200, 17])
    for cache in (whole, halved, filed):
        rows, labels = cache.take(ids)
        torch.testing.assert_close(rows, whole.rows[ids], rtol=1e-3, atol=0)
        assert rows.dtype == torch.float32 and labels.tolist() == encoder.train.labels[ids].tolist()
    assert not list(tmp_path.iterdir()), "the file has no name"
    monkeypatch.setattr("os.posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(
        UsageError, match=r"no room for 2.86e-05 GiB of features in .*No space left.*eval.linear.cache_dir"
    ):
        FeatureCache(extractor, encoder.backbone, memory_gib=0.0, folder=str(tmp_path))


def test_features_that_are_not_finite_or_too_large_are_errors(digits):
    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [images[:, 0].flatten(1) * self.factor]

    for factor, gib, message in ((math.inf, 1.0, "not finite"), (1e6, 0.0, "do not fit fp16")):
        encoder = few(digits, Times(factor))
        with pytest.raises(RunFailed, match=message):
            Linear(cache_gib=gib).run(encoder)
    with pytest.raises(RunFailed, match="diverged"):
        rule = SGD(lr=1e20, momentum=0.9, weight_decay=1.0)
        Linear(optimizer=rule, epochs=5).run(few(digits))


# From MMSelfSup's configs of 1.x: rule, rate, weight decay, batch, and rates after some epochs.
PROTOCOLS = {
    "linear_8xb32-steplr-100e_in1k": (SGD, 30.0, 0.0, 256, {0: 30.0, 59: 30.0, 60: 3.0, 80: 0.3, 99: 0.3}),
    "linear_8xb512-coslr-90e_in1k": (LARS, 1.6, 0.0, 4096, {0: 1.6, 45: 0.8, 89: 1.6 * 0.0003046}),
    "linear_8xb32-coslr-100e_in1k": (SGD, 0.3, 1e-6, 256, {0: 0.3, 50: 0.15}),
    "linear_8xb128-coslr-90e_in1k": (SGD, 0.4, 0.0, 1024, {0: 0.4, 45: 0.2}),
    "linear-vit_8xb128-coslr-90e_in1k": (SGD, 12.0, 0.0, 1024, {0: 12.0, 45: 6.0}),
    "linear_8xb2048-coslr-90e_in1k": (LARS, 6.4, 0.0, 16384, {0: 6.4e-4, 5: 3.2, 10: 6.4, 50: 3.2}),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_published_protocols(name):
    config = load(small_run.ROOT / f"configs/benchmarks/{name}.toml", schema=schema_of_parts())
    evaluation = config.build(EvalConfig, "eval")
    protocol = evaluation.linear
    kind, rate, decay, batch, rates = PROTOCOLS[name]
    assert (type(protocol.rule), protocol.rule.momentum, protocol.global_batch) == (kind, 0.9, batch)
    assert protocol.settings == [Setting(rate, decay)] and protocol.is_fresh
    assert protocol.norm == ("batch" if batch == 16384 else "auto")
    for epoch, expected in rates.items():
        got = protocol.lr.value(rate, 100 * epoch, 100, 100 * protocol.epochs)
        assert got == pytest.approx(expected, rel=1e-3), epoch
    assert [type(t).__name__ for t in protocol.transforms] == ["RandomResizedCrop", "RandomHorizontalFlip", "Normalize"]
    paths = [evaluation.train.data_prefix, evaluation.test.data_prefix]
    assert paths == [os.path.abspath("data/imagenet/train"), os.path.abspath("data/imagenet/val")]


def protocol_of(images: Path, folder: Path) -> Path:
    """MoCo's protocol, with small images and few epochs."""
    overlay = folder / "small.toml"
    overlay.write_text(
        f"extends = '{small_run.ROOT}/configs/benchmarks/linear_8xb32-steplr-100e_in1k.toml'\n"
        f"[eval.train]\n_delete_ = true\ntype = 'ImageFolder'\ndata_prefix = '{images}'\n"
        f"[eval.test]\n_delete_ = true\ntype = 'ImageFolder'\ndata_prefix = '{images}'\n"
        "[eval]\ntransforms = [{ type = 'CenterCrop', size = 24 }, { type = 'Normalize' }]\n"
        "linear = { epochs = 3, transforms.0.size = 24 }\n"
    )
    return overlay


def test_a_protocol_by_the_command_line(capsys, trained, images, tmp_path):
    """MoCo's protocol, with small images and few epochs."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    overlay = protocol_of(images, tmp_path)
    assert main(["eval", "linear", str(run), "--with", str(overlay), "--set", "eval.linear.global_batch=20"]) == 0
    assert capsys.readouterr().out.startswith("linear/top1_pct  ")
    (path,) = (run / "eval").glob("linear_step_00000006_*.json")
    kept = json.loads(path.read_text())
    assert kept["results"]["chosen"]["lr"] == 30 and kept["results"]["features"]["extracted"] == "every epoch"
    assert kept["results"]["linear/top1_pct"] == kept["results"]["grid"][0]["test_top1_pct"]
    assert "linear/top5_pct" not in kept["results"], "of four classes"


def test_a_stopped_training_continues_to_the_bit(capsys, trained, images, tmp_path, monkeypatch):
    """It is stopped twice, killed in the last epoch, and continued; with momentum and running statistics."""
    words = ["eval", "linear", str(trained), "--with", str(protocol_of(images, tmp_path))]
    words += ["--set", "eval.linear.global_batch=20", "--set", "eval.linear.norm='batch'"]
    assert main([*words, "-o", str(tmp_path / "whole")]) == 0
    (whole,) = (tmp_path / "whole").iterdir()
    stopped = tmp_path / "stopped"
    state_file = stopped / f"{whole.stem}.part.safetensors"
    step, steps, end_at = Heads.step, [], 0

    def counted(*arguments):
        steps.append(1)
        if len(steps) == end_at:
            end()
        return step(*arguments)

    def killed():
        raise MemoryError

    monkeypatch.setattr(Heads, "step", counted)
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        before, end_at, end = len(steps), len(steps) + 3, lambda number=number: signal.raise_signal(number)
        capsys.readouterr()
        assert main([*words, "-o", str(stopped)]) == code
        said = capsys.readouterr()
        assert said.out == "" and said.err.endswith(f"stopped and saved in {state_file}; the same command goes on\n")
        assert len(steps) == before + 3 and list(stopped.iterdir()) == [state_file]
    monkeypatch.setattr(partial_result, "SAVE_S", 0.0)
    end_at, end = 11, killed
    with pytest.raises(MemoryError):
        main([*words, "-o", str(stopped)])
    assert main([*words, "-o", str(stopped)]) == 0
    assert len(steps) == 12 + 1, "of 3 epochs of 4 steps one was done twice"
    assert [path.name for path in stopped.iterdir()] == [whole.name]
    first, second = (json.loads((tmp_path / name / whole.name).read_text()) for name in ("whole", "stopped"))
    assert first["results"] == second["results"]


def test_a_state_that_is_damaged_or_of_another_evaluation_is_ignored(tmp_path, caplog):
    tensors = {"weight": torch.arange(6.0), "loss": torch.ones(2)}
    path = tmp_path / "new" / "linear.part.safetensors"
    PartialResult(path, lambda: "this").save(tensors, 7, now=False)
    assert not path.exists(), "not so soon"
    PartialResult(path, lambda: "this").save(tensors, 7, now=True)

    def found(identity="this"):
        empty = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        return PartialResult(path, lambda: identity).load(empty), empty

    steps, loaded = found()
    assert steps == 7 and all(torch.equal(loaded[name], tensors[name]) for name in tensors) and not caplog.records
    whole = path.read_bytes()
    changed = whole[:-1] + bytes([whole[-1] ^ 1])
    for content, identity in ((whole, "other"), (whole[:-5], "this"), (changed, "this"), (b"", "this")):
        path.write_bytes(content)
        caplog.clear()
        steps, loaded = found(identity)
        assert steps == 0 and not any(tensor.any() for tensor in loaded.values())
        assert "starting over" in caplog.text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=0", "epochs must be at least 1"),
        ("validation=1.0", "validation must be above 0 and below 1"),
        ("optimizer={type='AdamW',lr=1.0}", "optimizer must be SGD or LARS"),
        ("optimizer={type='SGD',lr=1.0,grad_clip={max_norm=1.0}}", "without paramwise and grad_clip"),
        ("grid.lr=[]", "lr must list different numbers"),
        ("grid.weight_decay=[0.1, -1.0]", "weight_decay must list different numbers"),
        ("norm='scale'", 'expected "auto", "none"'),
        ("lr={policy='CosineRestart',periods=[3]}", "CosineRestart ends after"),
        ("transforms=[{type='CenterCrop',size=24},{type='Normalize'}]", "normalize differently"),
        ("cache_gibs=3", "did you mean cache_gib "),
    ],
)
def test_errors_are_one_line(capsys, trained, override, message):
    assert main(["eval", "linear", str(trained), "--set", f"eval.linear.{override}"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and message in err


def of_a_rank(digits: Path) -> list[dict]:
    """The results of several evaluations on one of several ranks."""
    torch.set_num_threads(1)
    distributed.init(CPU)
    configs = (
        Linear(epochs=4, global_batch=50, grid=LinearGrid(lr=[0.1, 1.0])),
        Linear(epochs=4, global_batch=50, grid=LinearGrid(lr=[0.1, 1.0]), transforms=FRESH, norm="batch"),
        Linear(epochs=2, global_batch=51, optimizer=LARS(lr=1.0, momentum=0.9, eta=0.02)),
    )
    found = [config.run(few(digits)) for config in configs]
    distributed.shutdown()
    return found


@pytest.mark.nightly
def test_two_ranks_give_the_result_of_one_process(digits):
    alone = of_a_rank(digits)
    first, second = run_ranks(of_a_rank, 2, digits)
    assert first == second
    for mine, theirs in zip(alone, first, strict=True):
        assert {**mine["chosen"], "train_loss": 0} == {**theirs["chosen"], "train_loss": 0}
        rows = zip([mine["chosen"], *mine["grid"]], [theirs["chosen"], *theirs["grid"]], strict=True)
        for ours, others in rows:
            assert ours == pytest.approx(others, rel=1e-4)
        assert mine["linear/top1_pct"] == theirs["linear/top1_pct"]


def test_a_rank_may_have_no_row_of_a_batch():
    heads = Heads(SETTINGS, LARS(lr=1.0, momentum=0.9), 6, 3, seed=0, device=CPU)
    before = heads.weight.clone()
    loss = heads.step(torch.empty(0, 6), torch.empty(0, dtype=torch.int64), 4, torch.ones(6))
    assert not loss.any()
    assert torch.equal(heads.weight[::2], before[::2]), "those without weight decay"
    assert not torch.equal(heads.weight[1::2], before[1::2])


def with_a_signal_to_the_second_rank(words: list[str]) -> list[int]:
    """Exit codes of a rank: the second rank gets a stop signal, and then the same command continues."""
    step = Heads.step
    codes = []
    for stops in (True, False):
        steps = []

        def counted(*arguments, steps=steps, stops=stops):
            steps.append(1)
            if stops and len(steps) == 6 and distributed.rank() == 1:
                signal.raise_signal(signal.SIGUSR1)
            return step(*arguments)

        Heads.step = counted
        codes += [main(words), len(steps)]
    return codes


@pytest.mark.nightly
def test_two_ranks_stop_and_continue_together(trained, images, tmp_path):
    words = ["eval", "linear", str(trained), "--with", str(protocol_of(images, tmp_path))]
    words += ["--set", "eval.linear.global_batch=20", "--set", "eval.linear.norm='batch'", "-o"]
    assert run_ranks(main, 2, [*words, str(tmp_path / "whole")]) == [0, 0]
    assert run_ranks(with_a_signal_to_the_second_rank, 2, [*words, str(tmp_path / "stopped")]) == 2 * [[75, 6, 0, 6]]
    (whole,), (stopped,) = ((tmp_path / name).iterdir() for name in ("whole", "stopped"))
    assert json.loads(whole.read_text())["results"] == json.loads(stopped.read_text())["results"]


@pytest.mark.gpu
@pytest.mark.needs("nvidia.dali")
@pytest.mark.parametrize("transforms", [None, FRESH], ids=["cached", "fresh"])
def test_a_gpu_gives_the_result_of_a_cpu(digits, transforms):
    config = Linear(epochs=10, grid=LinearGrid(lr=[0.1, 1.0]), transforms=transforms)
    encoders = [replace(few(digits), device=device, augment="exact") for device in (CPU, torch.device("cuda"))]
    mine, theirs = (config.run(encoder) for encoder in encoders)
    for ours, others in zip(mine["grid"], theirs["grid"], strict=True):
        assert ours["train_loss"] == pytest.approx(others["train_loss"], rel=0.01)
        assert ours["test_top1_pct"] == pytest.approx(others["test_top1_pct"], abs=2)
