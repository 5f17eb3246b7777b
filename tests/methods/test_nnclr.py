"""NNCLR against its paper, written longhand. (Cuts of the batch: test_cuts.py.)"""

import pytest
import torch
import torch.nn.functional as F
import two_views
from steps import PROGRESS, assert_close, longhand_step, step
from torch import Tensor
from two_views import FEATURES, random_batch

from sslrun.methods import nnclr
from sslrun.methods.nnclr import NNCLR, NNCLRHead, nearest
from sslrun.nn.necks import NonLinearNeck
from sslrun.nn.norm import BN, Norm, SyncBN

DIM, QUEUE = 6, 20


def small(norm: Norm = SyncBN()) -> NNCLR:
    torch.manual_seed(0)
    neck = NonLinearNeck(FEATURES, 16, DIM, num_layers=3, norm_cfg=norm)
    predictor = NonLinearNeck(DIM, 12, DIM, with_last_bn=False, with_last_bias=True, norm_cfg=norm)
    return NNCLR(two_views.backbone(norm), neck, NNCLRHead(predictor, temperature=0.2), QUEUE).double()


def longhand_neighbor(z: Tensor, queue: Tensor) -> Tensor:
    best = queue[0]
    for row in queue[1:]:
        if sum(a * b for a, b in zip(z, row, strict=True)) > sum(a * b for a, b in zip(z, best, strict=True)):
            best = row
    return best


def longhand(z: list[Tensor], p: list[Tensor], queue: Tensor) -> Tensor:
    """Algorithm 1 of arXiv 2104.14548, an image at a time."""
    total = p[0].new_zeros(())
    for a, b in ((0, 1), (1, 0)):
        unit = [each / (each * each).sum().sqrt() for each in p[b]]
        for i, projection in enumerate(z[a].detach()):
            neighbor = longhand_neighbor(projection, queue)
            scores = [(neighbor * each).sum() / 0.2 for each in unit]
            total = total - (scores[i].exp() / sum(score.exp() for score in scores)).log()
    return total / (2 * len(p[0]))


def test_a_step_is_the_papers():
    """Each view is one pass, with BatchNorm statistics of its own; neighbors get no gradient."""
    method, twin, batch = small(), small(), random_batch(6)
    z = [twin.neck(twin.backbone(view)[-1]) for view in batch.crops()]
    expected = longhand(z, [twin.head.predictor(each) for each in z], twin.queue.rows)
    actual = step(method, [batch])
    assert_close(actual, longhand_step(expected, twin))
    assert {name.split(".")[0] for name in actual.gradients} == {"backbone", "neck", "head"}


def test_the_first_views_are_queued_after_the_search():
    method, batch = small(), random_batch(6)
    before = method.queue.rows.clone()
    carry = step(method, [batch]).carry
    assert torch.equal(method.queue.rows, before)
    method.after_step(PROGRESS, carry)
    projections = F.normalize(small().neck(small().backbone(batch.crops()[0])[-1]), dim=1)
    torch.testing.assert_close(method.queue.rows, torch.cat([projections, before[6:]]))
    again = step(method, [batch])  # an image's nearest neighbor is now its own first view
    neighbors = nearest(projections, method.queue.rows)
    torch.testing.assert_close(neighbors, projections)
    assert again.loss != pytest.approx(step(small(), [batch]).loss, rel=1e-3)


def test_the_search_in_pieces_is_the_search(monkeypatch):
    torch.manual_seed(0)
    queries, rows = torch.randn(7, 5), F.normalize(torch.randn(11, 5), dim=1)
    expected = torch.stack([longhand_neighbor(query, rows) for query in queries])
    assert torch.equal(nearest(queries, rows), expected)
    monkeypatch.setattr(nnclr, "PIECE", 25)  # two queries at a time
    assert torch.equal(nearest(queries, rows), expected)


def test_similarities_are_not_rounded_under_autocast():
    torch.manual_seed(0)
    method = small().float()
    embedded = [
        *(F.normalize(torch.randn(8, DIM), dim=1) for _ in range(2)),
        *F.normalize(torch.randn(2, 8, DIM), dim=2),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.compare(embedded, PROGRESS).value
    assert torch.equal(loss, method.compare(embedded, PROGRESS).value)
    batch = random_batch(8)
    with torch.autocast("cpu", torch.bfloat16):
        views = [view.float() for view in batch.crops()]
        assert {view.dtype for view in method.embed(type(batch)(views, batch.index, None), PROGRESS)} == {torch.float32}


def test_bad_arguments_are_named():
    neck = NonLinearNeck(FEATURES, 16, DIM)
    with pytest.raises(ValueError, match="temperature is 0"):
        NNCLRHead(NonLinearNeck(DIM, 8, DIM), temperature=0)
    with pytest.raises(ValueError, match=r"predictor gives 5 channels .*, but the neck 6"):
        NNCLR(two_views.backbone(BN()), neck, NNCLRHead(NonLinearNeck(DIM, 8, 5)), QUEUE)


def test_recipes_are_as_published():
    recipe = two_views.recipe("nnclr.toml")
    two_views.assert_lars_leaves_out_biases_and_norms(recipe, 4.8, 4.8)
    assert (recipe.global_batch, recipe.data.samples_per_gpu, recipe.epochs) == (4096, 128, 1000)
    model = recipe.model
    assert (model.head.temperature, tuple(model.queue.rows.shape)) == (0.1, (98304, 256))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["neck.mlp.0.weight"] == (2048, 2048) and shapes["neck.mlp.6.weight"] == (256, 2048)
    assert shapes["neck.mlp.7.weight"] == (256,)
    assert shapes["head.predictor.mlp.0.weight"] == (4096, 256) and shapes["head.predictor.mlp.3.weight"] == (256, 4096)
    assert "head.predictor.mlp.4.weight" not in shapes
