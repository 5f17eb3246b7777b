"""SimSiam against its paper written longhand. (Cuts of the batch: test_cuts.py.)"""

import pytest
import torch
import two_views
from steps import assert_close, longhand_step, step
from torch import Tensor
from two_views import FEATURES, random_batch

from sslrun.contract import Progress
from sslrun.methods.simsiam import SimSiam
from sslrun.nn.heads import LatentPredictHead
from sslrun.nn.necks import NonLinearNeck
from sslrun.nn.norm import Norm, SyncBN
from sslrun.optim import learning_rates


def small(norm: Norm | None = None, predicted: int = 8) -> SimSiam:
    torch.manual_seed(0)
    norm = norm or SyncBN()
    neck = NonLinearNeck(FEATURES, 16, 8, num_layers=3, with_last_bn_affine=False, norm_cfg=norm or SyncBN())
    predictor = NonLinearNeck(8, 4, predicted, with_last_bn=False, with_last_bias=True, norm_cfg=norm or SyncBN())
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
    assert_close(step(method, [batch]), longhand_step(longhand(twin, *batch.crops()), twin))
    assert all(parameter.grad.any() for parameter in method.parameters())


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
        (rate,) = learning_rates([group], recipe.lr, Progress(7 * epochs, 10 * epochs, 10, 0))
        is_predictor = name.startswith("head.predictor.")
        assert rate == (0.05 if is_predictor else pytest.approx(0.05 * 0.2061, rel=1e-3)), name
