"""Rotation-Pred: the four turns pixel by pixel, the loss written longhand, and its indifference to the batch's cut."""

import math
from pathlib import Path

import pytest
import torch

from ranks import run_ranks
from sslrun.config import load
from sslrun.contract import Batch, Progress
from sslrun.methods.rotation_pred import RotationPred, turned
from sslrun.nn.heads import ClsHead
from sslrun.nn.norm import BN, SyncBN, group_norms, set_groups
from sslrun.nn.resnet import ResNet
from sslrun.recipe import Recipe
from sslrun.runtime import distributed

PROGRESS = Progress(step=3, total_steps=10, steps_per_epoch=5, seed=1)


def small(norm: BN | None = None) -> RotationPred:
    torch.manual_seed(0)
    backbone = ResNet(18, stem="small", base_width=4, norm_cfg=norm)
    return RotationPred(backbone, ClsHead(in_channels=32, num_classes=4, init_std=0.3)).double()


def random_batch(num_samples: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_samples, 3, 16, 16, dtype=torch.float64, generator=generator)
    return Batch([images], torch.arange(num_samples), None)


def piece(batch: Batch, first: int, size: int) -> Batch:
    return Batch([batch.views[0][first : first + size]], batch.index[first : first + size], None)


def step(method: RotationPred, batches: list[Batch]) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one optimizer step over micro-batches."""
    method.zero_grad()
    losses = []
    for batch, target in zip(batches, method.targets(batches, PROGRESS), strict=True):
        loss = method(batch, PROGRESS, target)
        (loss.value / len(batches)).backward()
        losses.append(loss.value.item())
    return sum(losses) / len(losses), [p.grad.clone() for p in method.parameters()]


def test_turns_move_every_pixel_where_it_belongs():
    size = 5
    images = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    turns = turned(images)
    assert turns.shape == (8, 3, size, size) and turns.is_contiguous(memory_format=torch.channels_last)
    for sample in range(2):
        for row in range(size):
            for column in range(size):
                pixel = images[sample, :, row, column]
                # A counter-clockwise quarter turn takes the right edge to the top.
                where = row, column
                for turn in range(4):
                    assert torch.equal(turns[2 * turn + sample, :, where[0], where[1]], pixel), (turn, row, column)
                    where = size - 1 - where[1], where[0]


def test_loss_and_gradient_are_the_papers():
    """Eq. 2 and 3 of arXiv 1803.07728, image by image and turn by turn; the backbone has no norm layers here."""

    class Pixels(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 6, 3)

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [torch.relu(self.conv(images))]

    torch.manual_seed(0)
    method = RotationPred(Pixels(), ClsHead(6, 4, init_std=1.0)).double()
    batch = random_batch(3)
    loss = method(batch, PROGRESS, None)
    loss.value.backward()
    found = {name: p.grad.clone() for name, p in method.named_parameters()}

    method.zero_grad()
    weight, bias = method.head.fc.weight, method.head.fc.bias
    total, hits = torch.zeros((), dtype=torch.float64), 0
    for image in batch.views[0]:
        for label in range(4):
            upright = image
            for _ in range(label):
                upright = upright.transpose(1, 2).flip(1)
            features = method.backbone(upright[None])[0][0].mean(dim=(1, 2))
            scores = [sum(w * f for w, f in zip(weight[k], features, strict=True)) + bias[k] for k in range(4)]
            total = total - (scores[label] - torch.log(sum(torch.exp(score) for score in scores)))
            hits += torch.stack(scores).argmax().item() == label
    (total / 12).backward()
    assert float(loss.value) == pytest.approx(float(total) / 12, rel=1e-12)
    assert float(loss.metrics["top1_pct"]) == pytest.approx(100 * hits / 12)
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("groups_at_once", [1, 2])
def test_the_cut_of_a_global_batch_does_not_show(groups_at_once):
    """BatchNorm groups of 4 samples in all their turns: as one batch of 16, and one or two groups at a time."""
    whole, cut = small(), small()
    set_groups(whole, 4, 4)
    set_groups(cut, 4, groups_at_once)
    batch = random_batch(16)
    loss, gradients = step(whole, [batch])
    size = 4 * groups_at_once
    loss_cut, gradients_cut = step(cut, [piece(batch, first, size) for first in range(0, 16, size)])
    assert loss == pytest.approx(loss_cut, rel=1e-12)
    torch.testing.assert_close(gradients, gradients_cut, rtol=1e-9, atol=1e-12)
    set_groups(cut, 8, 2)
    assert step(cut, [batch])[0] != pytest.approx(loss, rel=1e-6), "other groups compute the same"


def of_a_rank() -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of this rank's part of a batch with SyncBN, both averaged over the ranks."""
    torch.set_num_threads(1)
    distributed.init(torch.device("cpu"))
    own = 8 // distributed.world_size()
    loss, gradients = step(small(SyncBN()), [piece(random_batch(8), own * distributed.rank(), own)])
    tensors = [torch.tensor(loss, dtype=torch.float64), *gradients]
    distributed.all_reduce_mean_(tensors)
    distributed.shutdown()
    return tensors[0].item(), tensors[1:]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_are_one_batch(ranks, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    loss, gradients = step(small(SyncBN()), [random_batch(8)])
    for rank_loss, rank_gradients in run_ranks(of_a_rank, ranks):
        assert rank_loss == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(rank_gradients, gradients, rtol=1e-9, atol=1e-12)


def test_gradients_reach_everything():
    method = small()
    step(method, [random_batch(4)])
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())


def test_classifier_starts_as_the_recipe_says():
    torch.manual_seed(0)
    head = ClsHead(2048, 4)
    assert float(head.fc.weight.std()) == pytest.approx(0.01, rel=0.05) and not head.fc.bias.any()
    loss, _ = ClsHead(8, 4, init_std=1e-6)(torch.randn(5, 8), torch.tensor([0, 1, 2, 3, 3]))
    assert float(loss) == pytest.approx(small().chance_loss(), abs=1e-4) and small().chance_loss() == math.log(4)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_classes is 10, expected 4"):
        RotationPred(ResNet(18, base_width=4), ClsHead(32, 10))
    with pytest.raises(ValueError, match="views are 16x24, expected squares"):
        turned(torch.zeros(1, 3, 16, 24))
    with pytest.raises(ValueError, match="num_classes 1, expected at least 1 and 2"):
        ClsHead(8, 1)
    with pytest.raises(ValueError, match="init_std is 0"):
        ClsHead(8, 4, init_std=0)


def test_the_recipe_is_the_published_one():
    root = Path(__file__).parents[2]
    smaller = ["model.backbone.depth=18", "model.backbone.base_width=4", "model.head.in_channels=32"]
    config = load(root / "configs/rotation_pred.toml", smaller)
    assert config.name == "rotation-pred_resnet50_8xb16-steplr-70e_in1k" and config.notes == []
    recipe = config.build(Recipe)
    assert (recipe.epochs, recipe.global_batch, recipe.data.samples_per_gpu) == (70, 8 * 16, 16)
    (options,) = recipe.optimizer.create(recipe.model.named_parameters()).param_groups
    assert (options["lr"], options["weight_decay"], options["momentum"]) == (0.2, 1e-4, 0.9)
    rates = [recipe.lr.value(0.2, epoch * 100, 100, 7000) for epoch in (0, 5, 29, 30, 49, 50, 69)]
    assert rates == pytest.approx([0.02, 0.2, 0.2, 0.02, 0.02, 0.002, 0.002])
    assert all(norm.sync for norm in group_norms(recipe.model))
    (group,) = recipe.data.views
    assert [type(transform).__name__ for transform in group.transforms] == [
        *("RandomResizedCrop", "RandomHorizontalFlip", "Normalize")
    ]
    assert group.transforms[0].scale == (0.08, 1.0) and (group.num_views, group.size) == (1, (224, 224))
    name = "rotation-pred_resnet50_8xb16-amp-steplr-70e_in1k"
    values = load(root / "configs/rotation_pred.toml").values
    low = load(root / f"configs/selfsup/rotation_pred/{name}.toml").values
    assert low == values | {"engine": values["engine"] | {"precision": "bf16"}}
