"""LeJEPA against its paper, written longhand. (Cuts of the batch: test_cuts.py.)"""

import cmath
import itertools
import math

import pytest
import torch
import two_views
from steps import PROGRESS, assert_close, longhand_step, step
from torch import Tensor
from two_views import FEATURES

from sslrun.contract import Batch, Progress
from sslrun.methods.lejepa import LeJEPA, SIGReg
from sslrun.nn.necks import NonLinearNeck
from sslrun.nn.norm import Norm, SyncBN

DIM, SLICES = 5, 3


def small(large_crops: int = 2, norm: Norm = SyncBN()) -> LeJEPA:
    torch.manual_seed(0)
    neck = NonLinearNeck(FEATURES, 16, DIM, 3, with_last_bn=False, with_last_bias=True, norm_cfg=norm)
    return LeJEPA(two_views.backbone(norm), neck, SIGReg(SLICES), lambd=0.3, large_crops=large_crops).double()


def crops_of(num_samples: int, sizes: tuple[int, ...] = (8, 8, 4, 4, 4)) -> Batch:
    random = torch.Generator().manual_seed(0)
    views = [torch.randn(num_samples, 3, size, size, dtype=torch.float64, generator=random) for size in sizes]
    return Batch(views, torch.arange(num_samples), None)


def longhand_statistic(z: Tensor, slices: Tensor) -> Tensor:
    """Epps & Pulley's, a number at a time, over the whole range from -3 to 3."""
    total = z.new_zeros(())
    t = [-3 + 6 * k / 32 for k in range(33)]
    for direction in slices.T:
        x = [sum(a * b for a, b in zip(row, direction, strict=True)) for row in z]
        values = []
        for point in t:
            real = sum(torch.cos(point * each) for each in x) / len(x)
            imaginary = sum(torch.sin(point * each) for each in x) / len(x)
            normal = math.exp(-point * point / 2)
            values.append(((real - normal) ** 2 + imaginary**2) * normal)
        integral = sum((a + b) / 2 * 6 / 32 for a, b in itertools.pairwise(values))
        total = total + len(x) * integral
    return total / slices.shape[1]


def longhand(crops: list[Tensor], large_crops: int, slices: Tensor) -> Tensor:
    """Algorithm 2 of arXiv 2511.08544."""
    center = sum(crops[:large_crops]) / large_crops
    distance = sum(((z - center) ** 2).sum() for z in crops) / (len(crops) * crops[0].numel())
    return 0.7 * distance + 0.3 * sum(longhand_statistic(z, slices) for z in crops) / len(crops)


def slices_of(method: LeJEPA, progress: Progress = PROGRESS) -> Tensor:
    return method.head.slices(DIM, progress.generator()).double()


@pytest.mark.parametrize("large_crops", [1, 2])
def test_a_step_is_the_papers(large_crops):
    """Crops of one size are one pass of the backbone, all crops one of the neck."""
    method, twin, batch = small(large_crops), small(large_crops), crops_of(6)
    maps = [twin.backbone(torch.cat(views))[-1].mean(dim=(2, 3)) for views in (batch.views[:2], batch.views[2:])]
    crops = list(twin.neck(torch.cat(maps)).split(6))
    expected = longhand(crops, large_crops, slices_of(twin))
    actual = step(method, [batch])
    assert_close(actual, longhand_step(expected, twin))
    assert {name.split(".")[0] for name in actual.gradients} == {"backbone", "neck"}


def test_groups_of_views_are_their_crops():
    batch = crops_of(6)
    views = [torch.cat(batch.views[:2]), torch.cat(batch.views[2:])]
    assert_close(step(small(), [Batch(views, batch.index, None)]), step(small(), [batch]))


def test_the_statistic_of_normal_samples_does_not_depend_on_their_number():
    """Its mean is the integral of (1 - exp(-t^2)) exp(-t^2 / 2), whatever n."""
    head, random = SIGReg(8), torch.Generator().manual_seed(0)
    t = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    expected = torch.trapezoid((1 - torch.exp(-t * t)) * torch.exp(-t * t / 2), t).item()
    for n in (8, 64):
        z = torch.randn(400, n, 3, dtype=torch.float64, generator=random)
        assert head(z, head.slices(3, random).double()).item() == pytest.approx(expected, rel=0.1)
    z = torch.randn(1, 512, 3, dtype=torch.float64, generator=random)
    others = [z * 0.5, z + 1, torch.zeros_like(z)]
    assert all(head(other, head.slices(3, random).double()).item() > 5 * expected for other in others)


def test_the_statistic_is_the_distance_of_characteristic_functions():
    """One direction and two samples, by complex numbers."""
    head = SIGReg(1, knots=3, t_max=2.0)
    x = torch.tensor([[[0.5], [-1.25]]], dtype=torch.float64)
    values = []
    for t in (0.0, 1.0, 2.0):
        found = (cmath.exp(0.5j * t) + cmath.exp(-1.25j * t)) / 2
        values.append(abs(found - math.exp(-t * t / 2)) ** 2 * math.exp(-t * t / 2))
    expected = 2 * 2 * (values[0] / 2 + values[1] + values[2] / 2)
    assert head(x, torch.ones(1, 1, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)


def test_directions_are_new_in_each_step_and_equal_on_all_ranks():
    method = small()
    first, again, following, other = (
        slices_of(method, Progress(step, 10, 5, seed)) for step, seed in ((3, 1), (3, 1), (4, 1), (3, 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, following) and not torch.equal(first, other)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(SLICES, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_statistic_is_not_rounded_under_autocast():
    torch.manual_seed(0)
    method, embedded = small().float(), list(torch.randn(3, 8, DIM))
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.compare(embedded, PROGRESS).value
    assert torch.equal(loss, method.compare(embedded, PROGRESS).value)
    batch = crops_of(8)
    with torch.autocast("cpu", torch.bfloat16):
        views = [view.float() for view in batch.views]
        assert {z.dtype for z in method.embed(Batch(views, batch.index, None), PROGRESS)} == {torch.float32}


def test_bad_arguments_are_named():
    neck = NonLinearNeck(FEATURES, 16, DIM)
    with pytest.raises(ValueError, match=r"lambd is 1\.5"):
        LeJEPA(two_views.backbone(), neck, SIGReg(), lambd=1.5)
    with pytest.raises(ValueError, match="knots is 1"):
        SIGReg(knots=1)
    with pytest.raises(ValueError, match="num_slices is 0"):
        SIGReg(0)
    with pytest.raises(ValueError, match=r"give 1 crop\(s\), expected two or more"):
        step(small(), [crops_of(4, (8,))])


def test_recipes_are_as_published():
    for name, decay in (("resnet50", 5e-4), ("vit-large-p14", 0.05)):
        recipe = two_views.recipe(f"selfsup/lejepa/lejepa_{name}_8xb64-mcrop-2-6-coslr-100e_in1k-224-98.toml")
        assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (5e-4, decay)
        model = recipe.model
        assert (model.lambd, model.head.num_slices, model.head.knots, model.head.t_max) == (0.05, 1024, 17, 3.0)
        assert [(group.num_views, group.size) for group in recipe.data.views] == [(2, (224, 224)), (6, (98, 98))]
        rates = [recipe.lr.value(5e-4, at, 10, 1000) for at in (10, 1000)]
        assert rates == pytest.approx([5e-4, 5e-7])
