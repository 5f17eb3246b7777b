"""The supervised classifier: its loss by hand, mixing by loops, stochastic depth; nothing depends on how it is cut."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from steps import pieces

from sslrun.contract import Batch, Progress
from sslrun.methods.supervised import Mixing, Supervised, mixed
from sslrun.nn.resnet import ResNet
from sslrun.nn.vit import VisionTransformer

PROGRESS = Progress(step=3, total_steps=10, steps_per_epoch=5, seed=7)


def resnet(**options) -> ResNet:
    return ResNet(18, base_width=4, stem="small", **options)


def batch_of(samples: int, classes: int = 5, size: int = 8) -> Batch:
    random = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, size, size, generator=random)
    return Batch([images], torch.arange(samples), torch.randint(0, classes, (samples,), generator=random))


def loss_of(method: Supervised, batch: Batch):
    (targets,) = method.targets([batch], PROGRESS)
    return method(batch, PROGRESS, targets)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_cross_entropy_with_a_smoothed_target(smoothing):
    torch.manual_seed(0)
    method = Supervised(resnet(), num_classes=5, init_std=1.0, label_smoothing=smoothing).double()
    batch = batch_of(6)
    batch = Batch([batch.views[0].double()], batch.index, batch.label)
    loss = loss_of(method, batch)
    features = copy.deepcopy(method.backbone)(batch.views[0])[-1].mean(dim=(2, 3))
    scores = features @ method.classifier.fc.weight.T + method.classifier.fc.bias
    longhand = []
    for row, label in zip(scores, batch.label.tolist(), strict=True):
        probability = (row - row.max()).exp() / (row - row.max()).exp().sum()
        target = [smoothing / 5 + (1 - smoothing) * (k == label) for k in range(5)]
        longhand.append(-sum(t * p.log() for t, p in zip(target, probability, strict=True)))
    assert loss.value.item() == pytest.approx(torch.stack(longhand).mean().item(), abs=1e-5)  # scores are fp32
    assert loss.metrics["top1_pct"].item() == pytest.approx(100 * (scores.argmax(1) == batch.label).double().mean())


def test_mixing_by_loops():
    batch = batch_of(6)
    images, target = batch.views[0], F.one_hot(batch.label, 5).float()
    share, row, column = torch.tensor([0.3, 0.6, 0.2]), torch.tensor([0.5, 0.1, 0.9]), torch.tensor([0.2, 0.5, 0.9])
    is_cut = torch.tensor([False, True, True])
    got_images, got_target = mixed(images, target, Mixing(share, row, column, is_cut))
    for sample in range(6):
        other, pair = sample ^ 1, sample // 2
        kept = np.full((8, 8), share[pair].item())
        if is_cut[pair]:
            half = (1 - share[pair].item()) ** 0.5 / 2
            for i in range(8):
                for j in range(8):
                    in_rows = abs((i + 0.5) / 8 - row[pair].item()) < half
                    kept[i, j] = not (in_rows and abs((j + 0.5) / 8 - column[pair].item()) < half)
        weights = torch.from_numpy(kept).float()
        assert torch.allclose(got_images[sample], images[sample] * weights + images[other] * (1 - weights), atol=1e-6)
        weight = kept.mean()
        assert torch.allclose(got_target[sample], target[sample] * weight + target[other] * (1 - weight), atol=1e-6)
    assert 0 < weights.mean() < 1  # a box at the corner lost a part of its area


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1}, {"drop_path": 0.5}])
def test_what_is_drawn_does_not_depend_on_the_cut(options):
    torch.manual_seed(0)
    backbone = VisionTransformer("tiny", img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2)
    method = Supervised(backbone, 5, init_std=1.0, **options)
    whole = batch_of(8)
    parts = pieces(whole, 4)
    in_parts = [method(part, PROGRESS, t).value for part, t in zip(parts, method.targets(parts, PROGRESS), strict=True)]
    assert torch.stack(in_parts).mean().item() == pytest.approx(loss_of(method, whole).value.item(), abs=1e-5)
    plain = Supervised(method.backbone, 5)
    plain.classifier = method.classifier
    assert loss_of(plain, whole).value.item() != pytest.approx(loss_of(method, whole).value.item(), abs=1e-3)


def test_shares_follow_their_beta_distribution():
    method = Supervised(resnet(), 5, mixup=0.4, cutmix=2.0)
    (mixing,) = method._mixing(1, 20000, PROGRESS, torch.device("cpu"))
    assert mixing.is_cut.float().mean().item() == pytest.approx(0.5, abs=0.02)
    for alpha, shares in ((0.4, mixing.share[~mixing.is_cut]), (2.0, mixing.share[mixing.is_cut])):
        assert shares.mean().item() == pytest.approx(0.5, abs=0.02)
        assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


@pytest.mark.parametrize(
    ("backbone", "count"),
    [(resnet(), 8), (ResNet(50, base_width=4), 16), (VisionTransformer("tiny", img_size=8, patch_size=4, depth=3), 6)],
)
def test_stochastic_depth_leaves_branches_out_as_often_as_it_should(backbone, count):
    method = Supervised(backbone, 5, drop_path=0.4)
    assert method.drop_rates == pytest.approx(np.linspace(0, 0.4, count))
    (targets,) = method.targets([batch_of(2000, size=2)], PROGRESS)
    dropped = (targets[1] == 0).float().mean(dim=0)
    assert dropped.tolist() == pytest.approx(method.drop_rates, abs=0.04)
    assert torch.allclose(targets[1].mean(dim=0), torch.ones(count), atol=0.06)


def test_a_branch_that_is_left_out_leaves_the_sample_as_it_was():
    torch.manual_seed(0)
    backbone = VisionTransformer("tiny", img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    method = Supervised(backbone, 5, drop_path=0.5)
    batch, seen = batch_of(4), {}
    backbone.blocks[0].register_forward_hook(lambda block, args, out: seen.update({"in": args[0], "out": out}))
    kept = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    method(batch, PROGRESS, (None, kept))
    change = (seen["out"] - seen["in"]).abs().amax(dim=(1, 2))
    assert change[:2].tolist() == [0, 0] and change[2:].min() > 0
    method.eval()
    seen.clear()
    backbone(batch.views[0])  # nothing is left out where nothing is trained
    assert (seen["out"] - seen["in"]).abs().amax(dim=(1, 2)).min() > 0


def test_everything_is_trained_and_copies_drop_by_themselves():
    frozen = ResNet(18, base_width=4, stem="small", frozen_stages=0)
    method = Supervised(frozen, 5, drop_path=0.9)
    assert all(parameter.requires_grad for parameter in method.parameters())
    twin = copy.deepcopy(method)
    loss_of(method, batch_of(4))
    batch = batch_of(4)
    (targets,) = twin.targets([batch], PROGRESS)
    twin(batch, PROGRESS, (None, torch.ones_like(targets[1])))
    assert method._kept is None and twin._kept is None


def test_the_predictor_gives_the_scores():
    method = Supervised(resnet(), 5)
    images = batch_of(3).views[0]
    method.eval()
    scores = method.predictor()(images)
    assert torch.equal(scores, method.classifier.fc(method.backbone(images)[-1].mean(dim=(2, 3))))
    assert not any(name.startswith("_") for name in method.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"mixup": -1}, "mixup is -1"),
        ({"label_smoothing": 1}, "expected 0 to"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Supervised(resnet(), 5, **options)
    with pytest.raises(ValueError, match="3 samples at once: images are mixed in pairs"):
        loss_of(Supervised(resnet(), 5, mixup=1.0), batch_of(3))
