"""Barlow Twins against its paper written longhand. (Cuts of the batch: test_cuts.py.)"""

import pytest
import torch
import two_views
from steps import assert_close, longhand_step, step
from torch import Tensor
from two_views import FEATURES, random_batch

from sslrun.methods.barlowtwins import BarlowTwins
from sslrun.nn.heads import LatentCrossCorrelationHead
from sslrun.nn.necks import NonLinearNeck


def small(lambd: float = 0.3) -> BarlowTwins:
    torch.manual_seed(0)
    neck = NonLinearNeck(FEATURES, 16, 6, num_layers=3, with_last_bn=False)
    return BarlowTwins(two_views.backbone(), neck, LatentCrossCorrelationHead(lambd)).double()


def longhand(first: Tensor, second: Tensor, lambd: float) -> Tensor:
    """Eq. 1 and 2 of arXiv 2103.03230 on embeddings that are centered per dimension, a number at a time; the variance
    has BatchNorm's 1e-5, as in algorithm 1's code."""
    rows, dim = first.shape
    total = first.new_zeros(())
    for i in range(dim):
        for j in range(dim):
            a, b = first[:, i], second[:, j]
            mean_a, mean_b = sum(a) / rows, sum(b) / rows
            variance_a = sum((x - mean_a) ** 2 for x in a) / rows + 1e-5
            variance_b = sum((y - mean_b) ** 2 for y in b) / rows + 1e-5
            products = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / rows
            correlation = products / (variance_a * variance_b) ** 0.5
            total = total + ((1 - correlation) ** 2 if i == j else lambd * correlation**2)
    return total


@pytest.mark.parametrize("lambd", [0.0, 0.0051, 1.0])
def test_the_head_is_the_papers(lambd):
    torch.manual_seed(0)
    first = (torch.randn(7, 5, dtype=torch.float64) * 2 + 1).requires_grad_()
    second = (first.detach() + 0.5 * torch.randn(7, 5, dtype=torch.float64)).requires_grad_()
    expected = longhand(first, second, lambd)
    expected_gradients = torch.autograd.grad(expected, [first, second])
    loss = LatentCrossCorrelationHead(lambd)(first, second)
    torch.testing.assert_close(loss, expected)
    for gradient, wanted in zip(torch.autograd.grad(loss, [first, second]), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_a_step_is_the_papers():
    """Each view is one pass, with BatchNorm statistics of its own."""
    method, twin = small(), small()
    batch = random_batch(6)
    expected = longhand(*(twin.neck(twin.backbone(view)[-1]) for view in batch.crops()), 0.3)
    assert_close(step(method, [batch]), longhand_step(expected, twin))
    assert all(parameter.grad.any() for parameter in method.parameters())


def test_correlations_are_not_rounded_under_autocast():
    torch.manual_seed(0)
    first, second = torch.randn(2, 64, 16)
    head = LatentCrossCorrelationHead()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(first, second)
    assert torch.equal(loss, head(first, second))
    assert head(first.bfloat16(), second.bfloat16()).dtype == torch.float32


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="lambd is -1"):
        LatentCrossCorrelationHead(-1)


@pytest.mark.parametrize(
    ("batch", "per_gpu", "micro_batch", "epochs"),
    [("8xb256", 256, "auto", 300), ("8xb256", 256, "auto", 1000), ("8xb32-accum8", 32, 32, 100)],
)
def test_recipes_are_as_published(batch, per_gpu, micro_batch, epochs):
    recipe = two_views.recipe(f"selfsup/barlowtwins/barlowtwins_resnet50_{batch}-coslr-{epochs}e_in1k.toml")
    two_views.assert_lars_leaves_out_biases_and_norms(recipe, 1.6, 1.6 * 0.024)
    assert (recipe.global_batch, recipe.data.samples_per_gpu, recipe.epochs) == (2048, per_gpu, epochs)
    assert recipe.engine.micro_batch == micro_batch
    assert recipe.model.head.lambd == 0.0051 and recipe.model.neck.out_channels == 8192
    rates = [recipe.lr.value(1.6, at, 10, 10 * epochs) for at in (0, 100, 101, 10 * epochs)]
    assert rates[0] == pytest.approx(1.6e-4 * 1.6) and rates[3] == pytest.approx(1.6e-3)
    assert rates[2] < rates[1] < 1.6  # by iteration
