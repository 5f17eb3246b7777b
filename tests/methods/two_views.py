"""What the tests of methods with two views share: a small network, batches, and what their recipes have in common."""

from pathlib import Path
from typing import Any

import torch

from sslrun.config import load
from sslrun.contract import Batch
from sslrun.nn.norm import Norm, SyncBN
from sslrun.nn.resnet import ResNet
from sslrun.optim.groups import parameter_groups
from sslrun.recipe import Recipe
from sslrun.session import build

ROOT = Path(__file__).parents[2]
FEATURES = 4  # channels that `backbone` gives


def backbone(norm: Norm | None = None) -> ResNet:
    """One stage: each layer of SyncBN is four meetings of the ranks a step."""
    return ResNet(18, stem="small", base_width=4, out_indices=[1], norm_cfg=norm or SyncBN())


def random_batch(num_samples: int, size: int = 8) -> Batch:
    """Two views in one group, of unequal statistics, so that it shows who shares them."""
    random = torch.Generator().manual_seed(0)
    views = torch.randn(2, num_samples, 3, size, size, dtype=torch.float64, generator=random)
    views[1] = 2 * views[1] + 0.5
    return Batch([views.flatten(0, 1)], torch.arange(num_samples), None)


def in_two_groups(batch: Batch) -> Batch:
    return Batch(batch.crops(), batch.index, None)


def recipe(path: str) -> Recipe:
    """A shipped recipe, its networks without memory."""
    with torch.device("meta"):
        return build(load(str(ROOT / "configs" / path)))


def options_by_name(loaded: Recipe) -> dict[str, dict[str, Any]]:
    """The optimizer's options of each trained parameter, by its name."""
    optimizer = loaded.optimizer
    groups = parameter_groups(
        loaded.model.named_parameters(), optimizer.options(), optimizer.paramwise, type(optimizer).__name__
    )
    return {name: group for group in groups for name, _ in group["params"]}


def assert_lars_leaves_out_biases_and_norms(loaded: Recipe, lr: float, lr_of_those: float) -> None:
    """Only they are vectors."""
    options = options_by_name(loaded)
    vectors = {name for name, p in loaded.model.named_parameters() if p.requires_grad and p.dim() == 1}
    assert {name for name, group in options.items() if group["lars_exclude"]} == vectors
    for name, group in options.items():
        expected = (lr_of_those, 0.0, 0.9) if name in vectors else (lr, 1e-6, 0.9)
        assert (group["lr"], group["weight_decay"], group["momentum"]) == expected, name
