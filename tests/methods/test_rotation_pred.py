"""Rotation-Pred: the four turns pixel by pixel, the loss written longhand. (Cuts of the batch: test_cuts.py.)"""

import math
from pathlib import Path

import pytest
import torch
from steps import PROGRESS, assert_close, longhand_step, step

from sslrun.config import load
from sslrun.contract import Batch
from sslrun.methods.rotation_pred import RotationPred, turned
from sslrun.nn.heads import ClsHead
from sslrun.nn.norm import BN, Norm, group_norms
from sslrun.nn.resnet import ResNet
from sslrun.recipe import Recipe


def small(norm: Norm | None = None) -> RotationPred:
    torch.manual_seed(0)
    backbone = ResNet(18, stem="small", base_width=4, norm_cfg=norm or BN())
    return RotationPred(backbone, ClsHead(in_channels=32, num_classes=4, init_std=0.3)).double()


def random_batch(num_samples: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_samples, 3, 16, 16, dtype=torch.float64, generator=generator)
    return Batch([images], torch.arange(num_samples), None)


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
    assert_close(step(method, [batch]), longhand_step(total / 12, method))
    assert float(method(batch, PROGRESS, None).metrics["top1_pct"]) == pytest.approx(100 * hits / 12)


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
