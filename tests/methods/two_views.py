"""What the tests of methods with two views share: small networks, batches, a step of one rank, a recipe's groups."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslrun.config import load
from sslrun.contract import Batch, Method, Progress
from sslrun.nn.norm import BN, Norm, SyncBN, set_groups
from sslrun.nn.resnet import ResNet
from sslrun.optim.groups import parameter_groups
from sslrun.recipe import Recipe
from sslrun.session import build

ROOT = Path(__file__).parents[2]
PROGRESS = Progress(step=3, total_steps=10, steps_per_epoch=5, seed=1)
FEATURES = 4  # channels that `backbone` gives


def backbone(norm: Norm | None = None) -> ResNet:
    """One stage: each layer of SyncBN is four meetings of the ranks a step."""
    return ResNet(18, stem="small", base_width=4, out_indices=[1], norm_cfg=norm or SyncBN())


def norm_of(is_synchronized: bool) -> Norm:
    return SyncBN() if is_synchronized else BN()


def random_batch(num_samples: int, seed: int = 0) -> Batch:
    """Two views in one group, of unequal statistics, so that it shows who shares them."""
    random = torch.Generator().manual_seed(seed)
    views = torch.randn(2, num_samples, 3, 8, 8, dtype=torch.float64, generator=random)
    views[1] = 2 * views[1] + 0.5
    return Batch([views.flatten(0, 1)], torch.arange(num_samples), None)


def in_two_groups(batch: Batch) -> Batch:
    return Batch(batch.crops(), batch.index, None)


def piece(batch: Batch, first: int, size: int) -> Batch:
    part = slice(first, first + size)
    return Batch([torch.cat([view[part] for view in batch.crops()])], batch.index[part], None)


def step(method: Method, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one optimizer step over micro-batches, as the executor computes them."""
    method.zero_grad()
    with torch.no_grad():
        targets = method.targets(batches, PROGRESS)
    value = 0.0
    for batch, target in zip(batches, targets, strict=True):
        loss = method(batch, PROGRESS, target).value / len(batches)
        loss.backward()
        value += loss.item()
    return value, gradients(method)


def gradients(method: Method) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def assert_equal_steps(a: tuple[float, dict[str, Tensor]], b: tuple[float, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=1e-9, atol=0)
    assert a[1].keys() == b[1].keys() and a[1]
    for name, gradient in a[1].items():
        torch.testing.assert_close(gradient, b[1][name], rtol=1e-7, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def check_cuts(make: Callable[[], Method]) -> None:
    """With BatchNorm in groups of 4, a batch of 8 and two micro-batches of 4 are the same."""
    whole, cut = make(), make()
    set_groups(whole, 4, 2)
    set_groups(cut, 4, 1)
    batch = random_batch(8)
    assert_equal_steps(step(whole, [batch]), step(cut, [piece(batch, 0, 4), piece(batch, 4, 4)]))


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
