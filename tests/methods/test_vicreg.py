"""VICReg against its paper and the authors' weights, written longhand. (Cuts of the batch: test_cuts.py.)"""

import pytest
import torch
import two_views
from steps import assert_close, longhand_step, step
from torch import Tensor
from two_views import FEATURES, random_batch

from ranks import run_ranks
from sslrun.methods.vicreg import VICReg, hinge_and_redundancy
from sslrun.nn.necks import NonLinearNeck
from sslrun.runtime import distributed


def small(dim: int = 6) -> VICReg:
    torch.manual_seed(0)
    neck = NonLinearNeck(FEATURES, 16, dim, num_layers=3, with_bias=True, with_last_bn=False)
    return VICReg(two_views.backbone(), neck, 3.0, 5.0, 2.0).double()


def longhand_terms(z: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 1 to 4 of arXiv 2105.04906, a number at a time."""
    rows, dim = z.shape
    means = [sum(z[:, d]) / rows for d in range(dim)]

    def covariance(d: int, e: int) -> Tensor:
        return sum((z[i, d] - means[d]) * (z[i, e] - means[e]) for i in range(rows)) / (rows - 1)

    hinge = sum(torch.clamp(1 - (covariance(d, d) + 1e-4) ** 0.5, min=0) for d in range(dim)) / dim
    pairs = [(d, e) for d in range(dim) for e in range(dim) if d != e]
    return hinge, sum(covariance(d, e) ** 2 for d, e in pairs) / dim


def longhand(first: Tensor, second: Tensor) -> Tensor:
    """With the weights of `small`: the variance is the mean of the views, the covariance their sum."""
    distance = sum((a - b) ** 2 for a, b in zip(first.flatten(), second.flatten(), strict=True)) / first.numel()
    (hinge, pairs), (other_hinge, other_pairs) = longhand_terms(first), longhand_terms(second)
    return 3.0 * distance + 5.0 * (hinge + other_hinge) / 2 + 2.0 * (pairs + other_pairs)


@pytest.mark.parametrize("dim", [5, 7, 12])
def test_the_terms_are_the_papers(dim):
    """Seven rows: by D x D products, by either, and by N x N."""
    torch.manual_seed(0)
    scale = torch.linspace(0.3, 1.7, dim, dtype=torch.float64)  # some standard deviations are above 1
    z = (torch.randn(7, dim, dtype=torch.float64) * scale + 1).requires_grad_()
    for ours, expected in zip(hinge_and_redundancy(z), longhand_terms(z), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(value, z, retain_graph=True)[0] for value in (ours, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)
        assert gradients[0].any()


@pytest.mark.parametrize("dim", [4, 9])
def test_a_step_is_the_papers(dim):
    """Each view is one pass, with BatchNorm statistics of its own."""
    method, twin = small(dim), small(dim)
    batch = random_batch(6)
    expected = longhand(*(twin.neck(twin.backbone(view)[-1]) for view in batch.crops()))
    assert_close(step(method, [batch]), longhand_step(expected, twin))


def terms_of_a_rank() -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Mean terms over ranks, and the gradient of their sum with respect to this rank's rows, for each dimension."""
    torch.set_num_threads(1)
    distributed.init(torch.device("cpu"))
    results = {}
    for dim in (3, 9):
        whole = torch.randn(6, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))
        own = whole.chunk(distributed.world_size())[distributed.rank()].clone().requires_grad_()
        hinge, redundancy = hinge_and_redundancy(own)
        (gradient,) = torch.autograd.grad((hinge + redundancy) / distributed.world_size(), own)
        means = [hinge.detach().clone(), redundancy.detach().clone()]
        distributed.all_reduce_mean_(means)
        results[dim] = (*means, distributed.all_gather_rows(gradient))
    distributed.shutdown()
    return results


def test_two_ranks_are_one():
    """Both forms of the covariances."""
    expected = terms_of_a_rank()
    for results in run_ranks(terms_of_a_rank, 2):
        for dim, terms in expected.items():
            torch.testing.assert_close(results[dim], terms, rtol=1e-12, atol=1e-13)


def test_terms_are_not_rounded_under_autocast():
    torch.manual_seed(0)
    batch, method = random_batch(8), small().float()
    embedded = [torch.randn(8, 6), torch.randn(8, 6)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.compare(embedded, None).value
    assert torch.equal(loss, method.compare(embedded, None).value)
    with torch.autocast("cpu", torch.bfloat16):
        views = [view.float() for view in batch.crops()]
        assert {view.dtype for view in method.embed(type(batch)(views, batch.index, None), None)} == {torch.float32}


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="covariance is -1"):
        VICReg(two_views.backbone(), NonLinearNeck(FEATURES, 16, 6), covariance=-1)
    with pytest.raises(ValueError, match="two samples or more"):
        hinge_and_redundancy(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("batch", "epochs", "global_batch", "lr"), [("8xb64", 100, 512, 0.6), ("32xb64", 1000, 2048, 1.6)]
)
def test_recipes_are_as_published(batch, epochs, global_batch, lr):
    recipe = two_views.recipe(f"selfsup/vicreg/vicreg_resnet50_{batch}-coslr-{epochs}e_in1k.toml")
    two_views.assert_lars_leaves_out_biases_and_norms(recipe, lr, lr)
    assert (recipe.global_batch, recipe.data.samples_per_gpu, recipe.epochs) == (global_batch, 64, epochs)
    model = recipe.model
    assert (model.invariance, model.variance, model.covariance) == (25, 25, 1)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.neck.named_parameters()}
    assert shapes["mlp.0.weight"] == (8192, 2048) and shapes["mlp.6.weight"] == (8192, 8192)
    assert "mlp.0.bias" in shapes and "mlp.6.bias" not in shapes and "mlp.7.weight" not in shapes
    half = 100 + 10 * (epochs - 10) // 2  # ten steps an epoch
    rates = [recipe.lr.value(lr, at, 10, 10 * epochs) for at in (0, 100, half, 10 * epochs)]
    assert rates == pytest.approx([1e-4 * lr, lr, lr * 1.001 / 2, lr / 1000])
