"""BYOL against its paper written longhand. (Cuts of the batch: test_cuts.py.)"""

import math

import pytest
import torch
import two_views
from steps import PROGRESS, assert_close, longhand_step, step
from torch import Tensor
from two_views import FEATURES, random_batch

from sslrun.contract import Progress
from sslrun.methods.byol import BYOL
from sslrun.nn.heads import LatentPredictHead
from sslrun.nn.necks import NonLinearNeck
from sslrun.nn.norm import Norm, SyncBN


def small(norm: Norm | None = None, predicted: int = 8, **options: float) -> BYOL:
    torch.manual_seed(0)
    norm = norm or SyncBN()
    neck = NonLinearNeck(FEATURES, 16, 8, with_bias=True, with_last_bn=False, norm_cfg=norm or SyncBN())
    predictor = NonLinearNeck(8, 16, predicted, with_bias=True, with_last_bn=False, norm_cfg=norm or SyncBN())
    method = BYOL(two_views.backbone(norm), neck, LatentPredictHead(predictor), **options).double()
    with torch.no_grad():  # a teacher that is not the student, as after some steps
        for parameter in [*method.target_backbone.parameters(), *method.target_neck.parameters()]:
            parameter += 0.1 * torch.randn_like(parameter)
    return method


def regression(predictions: Tensor, targets: Tensor) -> Tensor:
    """Eq. 2 of arXiv 2006.07733, |q/|q| - t/|t||^2, a number at a time, mean over the images."""
    total = predictions.new_zeros(())
    for q, t in zip(predictions, targets.detach(), strict=True):
        length_q = sum(x * x for x in q) ** 0.5
        length_t = sum(x * x for x in t) ** 0.5
        total = total + sum((a / length_q - b / length_t) ** 2 for a, b in zip(q, t, strict=True))
    return total / len(predictions)


def longhand(method: BYOL, first: Tensor, second: Tensor) -> Tensor:
    """L of section 3.1: eq. 2 for one order of the views and for the other; each view is one pass."""

    def predicted(images: Tensor) -> Tensor:
        return method.head.predictor(method.neck(method.backbone(images)[-1]))

    def target(images: Tensor) -> Tensor:
        return method.target_neck(method.target_backbone(images)[-1])

    return regression(predicted(first), target(second)) + regression(predicted(second), target(first))


def test_a_step_is_the_papers():
    """But for the constant 4."""
    method, twin = small(), small()
    batch = random_batch(6)
    assert_close(step(method, [batch]), longhand_step(longhand(twin, *batch.crops()) - 4, twin))


def test_targets_are_the_teachers_and_have_no_gradient():
    method, twin = small(), small()
    batch = random_batch(6)
    with torch.no_grad():
        (targets,) = method.targets([batch], PROGRESS)
    for target, view in zip(targets, batch.crops(), strict=True):
        torch.testing.assert_close(target, twin.target_neck(twin.target_backbone(view)[-1]).detach())


@pytest.mark.parametrize("options", [{}, {"base_momentum": 0.9, "end_momentum": 0.95}])
def test_momentum_rises_along_a_cosine(options):
    """Section 3.2: tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2."""
    method = small(**options)
    base, end = options.get("base_momentum", 0.99), options.get("end_momentum", 1.0)
    for k in (0, 1, 7, 10):
        pairs = method.teachers(Progress(k, 10, 5, 0))
        expected = end - (end - base) * (math.cos(math.pi * k / 10) + 1) / 2
        assert [momentum for *_, momentum in pairs] == pytest.approx([expected] * 2, rel=1e-12)
        assert [(t, s) for t, s, _ in pairs] == [
            (method.target_backbone, method.backbone),
            (method.target_neck, method.neck),
        ]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"predictor gives 9 channels .* but the neck 8"):
        small(predicted=9)
    with pytest.raises(ValueError, match="base_momentum is 2"):
        small(base_momentum=2)
    with pytest.raises(ValueError, match="end_momentum is -1"):
        small(end_momentum=-1)


@pytest.mark.parametrize(
    ("name", "per_gpu", "micro_batch", "epochs", "lr"),
    [
        ("16xb256-coslr-200e", 256, "auto", 200, 4.8),
        ("8xb32-accum16-coslr-100e", 32, 32, 100, 7.2),
        ("8xb32-accum16-coslr-200e", 32, 32, 200, 4.8),
        ("8xb32-accum16-coslr-300e", 32, 32, 300, 4.8),
        ("8xb256-amp-accum2-coslr-100e", 256, 256, 100, 7.2),
        ("8xb256-amp-accum2-coslr-200e", 256, 256, 200, 4.8),
        ("8xb256-amp-accum2-coslr-300e", 256, 256, 300, 4.8),
    ],
)
def test_recipes_are_as_published(name, per_gpu, micro_batch, epochs, lr):
    recipe = two_views.recipe(f"selfsup/byol/byol_resnet50_{name}_in1k.toml")
    two_views.assert_lars_leaves_out_biases_and_norms(recipe, lr, lr)
    assert recipe.engine.precision == ("bf16" if "-amp-" in name else "auto")
    assert (recipe.global_batch, recipe.epochs) == (4096, epochs)
    assert (recipe.data.samples_per_gpu, recipe.engine.micro_batch) == (per_gpu, micro_batch)
    assert (recipe.model.base_momentum, recipe.model.end_momentum) == (0.99, 1.0)
    assert [group.num_views for group in recipe.data.views] == [1, 1]
    assert [[t.p for t in group.transforms[-3:-1]] for group in recipe.data.views] == [[1.0, 0.0], [0.1, 0.2]]
