"""Relative-Loc: its loss pair by pair, the center encoded once, dropout by the step. (Cuts: test_cuts.py.)"""

import math
from pathlib import Path

import pytest
import torch
from steps import PROGRESS, assert_close, longhand_step, step

from sslrun.config import load
from sslrun.contract import Batch, Progress
from sslrun.methods.relative_loc import RelativeLoc
from sslrun.nn.dropout import dropout_masks
from sslrun.nn.heads import ClsHead
from sslrun.nn.necks import RelativeLocNeck
from sslrun.nn.norm import Norm, group_norms
from sslrun.nn.resnet import ResNet
from sslrun.recipe import Recipe

WIDTH = 10


def small(norm: Norm | None = None, dropout: float = 0.5) -> RelativeLoc:
    torch.manual_seed(0)
    own = {} if norm is None else {"norm_cfg": norm}
    backbone = ResNet(18, stem="small", base_width=4, **own)
    neck = RelativeLocNeck(in_channels=32, out_channels=WIDTH, dropout=dropout, **own)
    return RelativeLoc(backbone, neck, ClsHead(in_channels=WIDTH, num_classes=8, init_std=0.3)).double()


def random_batch(num_samples: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(9 * num_samples, 3, 8, 8, dtype=torch.float64, generator=generator)
    return Batch([patches], torch.arange(num_samples), None)


class Pixels(torch.nn.Module):
    """A backbone without norm layers, so that a patch can be encoded alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.seen = torch.nn.Conv2d(3, 6, 3), 0

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.seen += len(images)
        return [torch.relu(self.conv(images))]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_loss_and_gradient_are_the_papers(dropout):
    """Every image's eight pairs one by one: outer patch and center fused, normalized over all pairs, classified."""
    torch.manual_seed(0)
    neck = RelativeLocNeck(in_channels=6, out_channels=WIDTH, dropout=dropout)
    method = RelativeLoc(Pixels(), neck, ClsHead(WIDTH, 8, init_std=1.0)).double()
    batch = random_batch(3)
    found = step(method, [batch])
    assert method.backbone.seen == 9 * 3, "the center is encoded more than once"

    patches = batch.views[0].view(9, 3, 3, 8, 8)
    masks = dropout_masks(1, (3, 8 * WIDTH), dropout, (1 << 31) + 3, torch.device("cpu"))[0].view(3, 8, WIDTH)
    hidden, kept, labels = [], [], []
    for sample in range(3):
        center = method.backbone(patches[4, sample][None])[0][0].mean(dim=(1, 2))
        for label, place in enumerate([0, 1, 2, 3, 5, 6, 7, 8]):
            outer = method.backbone(patches[place, sample][None])[0][0].mean(dim=(1, 2))
            pair = [*outer, *center]
            hidden.append(torch.stack([sum(w * x for w, x in zip(row, pair, strict=True)) for row in neck.fc.weight]))
            kept.append(masks[sample, label] if dropout else torch.ones(WIDTH))
            labels.append(label)
    rows = torch.stack(hidden) + neck.fc.bias
    variance = (rows - rows.mean(0)).square().mean(0)
    rows = (rows - rows.mean(0)) / torch.sqrt(variance + 1e-5) * neck.bn.weight + neck.bn.bias
    rows = rows.clamp(min=0) * torch.stack(kept)
    scores = rows @ method.head.fc.weight.T + method.head.fc.bias
    losses = [torch.logsumexp(row, 0) - row[label] for row, label in zip(scores, labels, strict=True)]
    assert_close(found, longhand_step(sum(losses) / 24, method))
    hits = sum(int(row.argmax()) == label for row, label in zip(scores, labels, strict=True))
    (target,) = method.targets([batch], PROGRESS)
    assert float(method(batch, PROGRESS, target).metrics["top1_pct"]) == pytest.approx(100 * hits / 24)
    assert not dropout or 0.3 < torch.stack(kept).eq(0).float().mean() < 0.7


def test_the_repeated_center_would_be_the_same():
    """MMSelfSup runs the center eight times: BatchNorm statistics, and so the loss, are the same to the last digits."""
    method = small(dropout=0.0)
    batch = random_batch(6)
    views = batch.crops()
    outer = method.backbone(torch.cat([view for place, view in enumerate(views) if place != 4]))[-1]
    center = method.backbone(torch.cat([views[4]] * 8))[-1]
    rows = method.neck(torch.cat([outer, center], dim=1).mean(dim=(2, 3)))
    expected, _ = method.head(rows, torch.arange(8).repeat_interleave(6))
    assert float(method(batch, PROGRESS, None).value) == pytest.approx(float(expected), rel=1e-10)


def test_dropout_changes_with_the_step_alone():
    method, batch = small(), random_batch(4)
    (first,), (again,) = method.targets([batch], PROGRESS), method.targets([batch], PROGRESS)
    (later,) = method.targets([batch], Progress(4, 10, 5, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert first.shape == (32, WIDTH) and set(first.unique().tolist()) == {0.0, 2.0}
    assert small(dropout=0.0).targets([batch], PROGRESS) == [None]


def test_layers_start_and_average_as_the_recipe_says():
    torch.manual_seed(0)
    neck = RelativeLocNeck(256, 512)
    assert [norm.momentum for norm in group_norms(neck)] == [0.003] and not group_norms(neck)[0].sync
    assert neck.fc.in_features == 512 and neck.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not neck.fc.bias.any() and small().chance_loss() == math.log(8)
    neck.eval()
    assert torch.equal(neck(torch.ones(2, 512)), torch.relu(neck.bn(neck.fc(torch.ones(2, 512)))))


def test_bad_arguments_are_named():
    backbone, neck = ResNet(18, base_width=4), RelativeLocNeck(32, WIDTH)
    with pytest.raises(ValueError, match="num_classes is 9, expected 8"):
        RelativeLoc(backbone, neck, ClsHead(WIDTH, 9))
    with pytest.raises(ValueError, match="dropout is 1, expected 0 to below 1"):
        RelativeLocNeck(32, WIDTH, dropout=1)
    with pytest.raises(ValueError, match="an image has 2 views, expected 9 patches"):
        small(dropout=0.0)(Batch([torch.zeros(4, 3, 8, 8).double()], torch.arange(2), None), PROGRESS, None)


def test_the_recipe_is_the_published_one():
    root = Path(__file__).parents[2]
    smaller = ["model.backbone.depth=18", "model.backbone.base_width=4", "model.neck.in_channels=32"]
    config = load(root / "configs/relative_loc.toml", smaller)
    assert config.name == "relative-loc_resnet50_8xb64-steplr-70e_in1k" and config.notes == []
    recipe = config.build(Recipe)
    assert (recipe.epochs, recipe.global_batch, recipe.data.samples_per_gpu) == (70, 8 * 64, 64)
    groups = recipe.optimizer.create(recipe.model.named_parameters()).param_groups
    decays = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert all(decay == (1e-4 if name.startswith("backbone.") else 5e-4) for name, decay in decays.items())
    assert len(decays) == len(list(recipe.model.parameters())) and {group["lr"] for group in groups} == {0.2}
    rates = [recipe.lr.value(0.2, epoch * 100, 100, 7000) for epoch in (0, 5, 29, 30, 49, 50, 69)]
    assert rates == pytest.approx([0.02, 0.2, 0.2, 0.02, 0.02, 0.002, 0.002])
    (group,) = recipe.data.views
    assert (group.num_views, group.size, recipe.model.neck.out_channels) == (9, (64, 64), 4096)
    assert [type(transform).__name__ for transform in group.steps] == [
        *("Resize", "RandomCrop", "RandomGridPatch", "RandomGrayscale")
    ]
    assert [round(255 * x) for x in group.normalize.mean + group.normalize.std] == [124, 117, 104, 59, 58, 58]
