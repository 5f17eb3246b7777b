"""MSN against its paper and the authors' code, written longhand. (Cuts of the batch: test_cuts.py.)"""

import math

import pytest
import torch
import torch.nn.functional as F
import two_views
from steps import PROGRESS, assert_close, longhand_step, step
from torch import Tensor

from sslrun.contract import Batch, Progress
from sslrun.methods.msn import MSN, MSNHead
from sslrun.nn.necks import DINONeck
from sslrun.nn.norm import SyncBN
from sslrun.nn.vit import VisionTransformer

SIDE, PROTOTYPES = 4, 7


def small(sinkhorn_iterations: int = 3) -> MSN:
    torch.manual_seed(0)
    backbone = VisionTransformer(embed_dim=16, depth=2, num_heads=2, img_size=16, patch_size=SIDE, positions="learned")
    neck = DINONeck(16, 12, 6, num_layers=2, norm_cfg=SyncBN())
    head = MSNHead(6, PROTOTYPES, sinkhorn_iterations=sinkhorn_iterations, entropy_weight=0.7)
    method = MSN(backbone, neck, head, patch_drop=0.3).double()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the teacher differs from the student
        for parameter in method.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=random))
    return method


def crops_of(num_samples: int, sizes: tuple[int, ...] = (16, 16, 8, 8)) -> Batch:
    random = torch.Generator().manual_seed(0)
    views = [torch.randn(num_samples, 3, size, size, dtype=torch.float64, generator=random) for size in sizes]
    return Batch(views, torch.arange(num_samples), None)


def longhand(method: MSN, batch: Batch, iterations: int) -> Tensor:
    """`init_msn_loss` and `distributed_sinkhorn` of the authors' losses.py, on probabilities."""
    first, large, *focal = batch.crops()
    kept = torch.randperm(16, generator=PROGRESS.generator())[:11]
    backbone, samples = method.backbone, len(first)
    tokens = backbone.patch_embed(large) + backbone.pos_embed[:, 1:]
    tokens = torch.cat(
        [(backbone.cls_token + backbone.pos_embed[:, :1]).expand(samples, -1, -1), tokens[:, kept]], dim=1
    )
    features = [backbone.norm(backbone.blocks(tokens))[:, 0], backbone(torch.cat(focal))[-1]]
    anchors = method.neck(torch.cat(features))
    directions = method.head.prototypes / method.head.prototypes.norm(dim=1, keepdim=True)

    def predicted(z: Tensor) -> Tensor:
        return torch.softmax(z / z.norm(dim=1, keepdim=True) @ directions.T / 0.1, dim=1)

    with torch.no_grad():
        q = predicted(method.teacher_neck(method.teacher_backbone(first)[-1])) ** 4
        q = q / q.sum(dim=1, keepdim=True)
        for _ in range(iterations):
            q = q / q.sum(dim=0)
            q = q / q.sum(dim=1, keepdim=True)
    p = predicted(anchors)
    cross_entropy = -(q.repeat(len(p) // samples, 1) * p.log()).sum(dim=1).mean()
    mean = p.mean(dim=0)
    return cross_entropy + 0.7 * (math.log(PROTOTYPES) + (mean * mean.log()).sum())


@pytest.mark.parametrize("iterations", [0, 3])
def test_a_step_is_the_authors(iterations: int) -> None:
    method, twin, batch = small(iterations), small(iterations), crops_of(5)
    actual = step(method, [batch])
    assert_close(actual, longhand_step(longhand(twin, batch, iterations), twin))
    assert {"head.prototypes", "backbone.cls_token", "neck.mlp.0.weight"} <= actual.gradients.keys()
    assert not any(name.startswith("teacher") for name in actual.gradients)


def test_the_dropped_patches_are_those_of_the_step() -> None:
    method, batch = small(), crops_of(3)

    def masked(step: int) -> Tensor:
        """The embedding of the crops of which patches are dropped."""
        return method.embed(batch, Progress(step, 10, 5, 1))[1]

    first, again, other = (masked(step) for step in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    seen, whole = 0, batch.views[1].clone()
    for place in range(16):
        batch.views[1][1:2, :, place // 4 * 4 : place // 4 * 4 + 4, place % 4 * 4 : place % 4 * 4 + 4] += 1
        seen += not torch.equal(masked(3), first)
        batch.views[1].copy_(whole)
    assert seen == 11  # of 16, 30 % dropped


def test_equal_predictions_cost_the_logarithm_of_the_number_of_prototypes() -> None:
    method = small()
    with torch.no_grad():
        method.head.prototypes.copy_(torch.ones(PROTOTYPES, 6))
    assert step(method, [crops_of(4)]).loss == pytest.approx(math.log(PROTOTYPES)) == method.chance_loss()


def test_scores_are_not_rounded_under_autocast() -> None:
    torch.manual_seed(0)
    method, embedded = small().float(), list(F.normalize(torch.randn(3, 8, 6), dim=2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.compare(embedded, PROGRESS).value
    assert torch.equal(loss, method.compare(embedded, PROGRESS).value)


def test_bad_arguments_are_named() -> None:
    method = small()
    with pytest.raises(ValueError, match="patch_drop is 1"):
        MSN(method.backbone, method.neck, method.head, patch_drop=1.0)
    with pytest.raises(ValueError, match="feat_dim is 5"):
        MSN(method.backbone, method.neck, MSNHead(5, PROTOTYPES))
    with pytest.raises(ValueError, match=r"give 1 crop\(s\), expected more than masked_crops"):
        step(method, [crops_of(4, (16,))])


def test_the_recipe_is_as_published() -> None:
    recipe = two_views.recipe("msn.toml")
    assert (recipe.global_batch, recipe.data.samples_per_gpu, recipe.epochs) == (1024, 64, 800)
    assert [(group.num_views, group.size) for group in recipe.data.views] == [(2, (224, 224)), (10, (96, 96))]
    model, head = recipe.model, recipe.model.head
    assert (model.patch_drop, model.masked_crops, tuple(head.prototypes.shape)) == (0.15, 1, (1024, 256))
    assert (head.temperature, head.target_temperature, head.entropy_weight) == (0.1, 0.025, 1.0)
    rates = [recipe.lr.value(1e-3, at, 10, 8000) for at in (0, 150, 8000)]
    assert rates == pytest.approx([2e-4, 1e-3, 1e-6])
    assert recipe.optimizer.grad_clip.max_norm == 3.0
    assert "neck.mlp.1.weight" in dict(model.named_parameters()), "a norm"
