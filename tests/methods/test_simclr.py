"""SimCLR against its paper written longhand. (Cuts of the batch: test_cuts.py.)"""

import pytest
import torch
import two_views
from steps import PROGRESS, assert_close, longhand_step, pieces, step
from torch import Tensor
from two_views import FEATURES, random_batch

from sslrun.methods.simclr import SimCLR
from sslrun.nn.heads import ContrastiveHead
from sslrun.nn.necks import NonLinearNeck
from sslrun.nn.norm import SyncBN


def small() -> SimCLR:
    torch.manual_seed(0)
    neck = NonLinearNeck(FEATURES, 16, 8, norm_cfg=SyncBN())
    return SimCLR(two_views.backbone(), neck, ContrastiveHead(temperature=0.3)).double()


def longhand(embeddings: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 of arXiv 2002.05709, a pair at a time; rows i and i + B are one image."""
    rows, half = len(embeddings), len(embeddings) // 2
    total = embeddings.new_zeros(())
    for i in range(rows):

        def similarity(j: int, i: int = i) -> Tensor:
            a, b = embeddings[i], embeddings[j]
            return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt() / temperature

        partner = i + half if i < half else i - half
        others = sum(similarity(k).exp() for k in range(rows) if k != i)
        total = total - (similarity(partner).exp() / others).log()
    return total / rows


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_head_is_the_papers(temperature):
    torch.manual_seed(0)
    embeddings = (torch.randn(10, 6, dtype=torch.float64) * 3).requires_grad_()
    expected = longhand(embeddings, temperature)
    (expected_gradient,) = torch.autograd.grad(expected, embeddings)
    loss = ContrastiveHead(temperature).between_views(embeddings)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_a_step_is_the_papers():
    """Both views of all images in one call: with shared statistics."""
    method, twin = small(), small()
    batch = random_batch(6)
    expected = longhand(twin.neck(twin.backbone(torch.cat(batch.crops()))[-1]), 0.3)
    assert_close(step(method, [batch]), longhand_step(expected, twin))
    assert all(parameter.grad.any() for parameter in method.parameters())


def test_micro_batches_are_compared_within_themselves():
    batch = random_batch(8)
    parts = pieces(batch, 4)
    separate = [step(small(), [part]).loss for part in parts]
    together = step(small(), parts).loss
    assert together == pytest.approx(sum(separate) / 2)
    assert together != pytest.approx(step(small(), [batch]).loss, rel=1e-2)


def test_bad_arguments_are_named():
    batch = random_batch(6)
    one_view = type(batch)([batch.crops()[0]], batch.index, None)
    with pytest.raises(ValueError, match="compares 2 views of each image, not 1"):
        small()(one_view, PROGRESS, None)
    with pytest.raises(ValueError, match="temperature is 0"):
        ContrastiveHead(0)


@pytest.mark.parametrize(
    ("name", "lr", "batch", "epochs"),
    [
        ("8xb32-coslr-200e", 0.3, 256, 200),
        ("8xb64-coslr-200e", 0.6, 512, 200),
        ("16xb256-coslr-200e", 4.8, 4096, 200),
        ("16xb256-coslr-800e", 4.8, 4096, 800),
    ],
)
def test_recipes_are_as_published(name, lr, batch, epochs):
    recipe = two_views.recipe(f"selfsup/simclr/simclr_resnet50_{name}_in1k.toml")
    two_views.assert_lars_leaves_out_biases_and_norms(recipe, lr, lr)
    gpus, _, per_gpu = name.split("-")[0].partition("xb")
    assert (recipe.global_batch, recipe.data.samples_per_gpu, recipe.epochs) == (batch, int(per_gpu), epochs)
    assert int(gpus) * int(per_gpu) == batch
    assert recipe.model.head.temperature == 0.1
    rates = [recipe.lr.value(lr, at, 10, 10 * epochs) for at in (0, 50, 100, 109, 10 * epochs // 2)]
    assert rates[0] == pytest.approx(1e-4 * lr)
    assert rates[2] == rates[3] < lr and rates[1] < rates[2]
    assert rates[4] == pytest.approx(lr / 2)
