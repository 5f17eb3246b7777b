"""SimSiam against its paper written longhand, and against itself on other cuts of the same global batch."""

from functools import partial

import pytest
import torch
import two_views
from torch import Tensor
from two_views import FEATURES, random_batch, step

from sslrun.methods.simsiam import SimSiam
from sslrun.nn.heads import LatentPredictHead
from sslrun.nn.necks import NonLinearNeck
from sslrun.optim import learning_rates


def small(is_synchronized: bool = True, predicted: int = 8) -> SimSiam:
    torch.manual_seed(0)
    norm = two_views.norm_of(is_synchronized)
    neck = NonLinearNeck(FEATURES, 16, 8, num_layers=3, with_last_bn_affine=False, norm_cfg=norm)
    predictor = NonLinearNeck(8, 4, predicted, with_last_bn=False, with_last_bias=True, norm_cfg=norm)
    return SimSiam(two_views.backbone(norm), neck, LatentPredictHead(predictor)).double()


def distance(p: Tensor, z: Tensor) -> Tensor:
    """D of arXiv 2011.10566, algorithm 1, with its stop-gradient, a number at a time."""
    total = p.new_zeros(())
    for a, b in zip(p, z.detach(), strict=True):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        total = total - dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    return total / len(p)


def longhand(method: SimSiam, first: Tensor, second: Tensor) -> Tensor:
    """Algorithm 1: D(p1, z2) / 2 + D(p2, z1) / 2; each view is one pass."""
    z1, z2 = method.neck(method.backbone(first)[-1]), method.neck(method.backbone(second)[-1])
    p1, p2 = method.head.predictor(z1), method.head.predictor(z2)
    return distance(p1, z2) / 2 + distance(p2, z1) / 2


def test_a_step_is_the_papers():
    method, twin = small(), small()
    batch = random_batch(6)
    expected = longhand(twin, *batch.crops())
    expected.backward()
    two_views.assert_equal_steps(step(method, [batch]), (expected.item(), two_views.gradients(twin)))
    assert all(parameter.grad.any() for parameter in method.parameters())


def test_one_view_group_or_two():
    batch = random_batch(6)
    two_views.assert_equal_steps(step(small(), [batch]), step(small(), [two_views.in_two_groups(batch)]))


def test_the_cut_of_a_global_batch_does_not_show():
    two_views.check_cuts(partial(small, is_synchronized=False))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"predictor gives 9 channels .* but the neck 8"):
        small(predicted=9)


@pytest.mark.parametrize("epochs", [100, 200])
def test_recipes_are_as_published(epochs):
    recipe = two_views.recipe(f"selfsup/simsiam/simsiam_resnet50_8xb32-coslr-{epochs}e_in1k.toml")
    assert (recipe.global_batch, recipe.data.samples_per_gpu, recipe.epochs) == (256, 32, epochs)
    assert recipe.model.neck.mlp[-1].weight is None and recipe.model.neck.mlp[-1].bias is None
    options = two_views.options_by_name(recipe)
    assert {(group["lr"], group["weight_decay"], group["momentum"]) for group in options.values()} == {
        (0.05, 1e-4, 0.9)
    }
    for name, group in options.items():
        (rate,) = learning_rates([group], recipe.lr, 7 * epochs, 10, 10 * epochs)
        is_predictor = name.startswith("head.predictor.")
        assert rate == (0.05 if is_predictor else pytest.approx(0.05 * 0.2061, rel=1e-3)), name
