"""DINO against its paper and the authors' code written longhand. (Cuts of the batch: test_cuts.py.)"""

import math

import pytest
import torch
import torch.nn.functional as F
import two_views
from steps import PROGRESS, assert_close, longhand_step, pieces, step
from torch import Tensor
from two_views import FEATURES

from sslrun.contract import Batch, Progress
from sslrun.methods.dino import DINO
from sslrun.nn.necks import DINONeck
from sslrun.nn.norm import BN, Norm
from sslrun.nn.self_distillation import DINOHead, Prototypes
from sslrun.nn.vit import VisionTransformer
from sslrun.scheduled import Scheduled, at

SHARP = Scheduled(schedule="linear", start=0.04, end=0.07)


def small(norm: Norm | None = None, learned_length: bool = False, backbone=None) -> DINO:
    torch.manual_seed(0)
    backbone = backbone or two_views.backbone(norm or BN())
    neck = DINONeck(backbone.num_features, 16, 6)
    head = DINOHead(6, 12, teacher_temperature=SHARP, learned_length=learned_length)
    method = DINO(backbone, neck, head, momentum=Scheduled(schedule="linear", start=0.5, end=0.9)).double()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the teacher and the center differ from the start
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=random))
        method.head.center.copy_(0.1 * torch.randn(12, dtype=torch.float64, generator=random))
    return method


def multi_crop(num_samples: int, sizes: tuple[int, ...] = (8, 8, 4, 4, 4)) -> Batch:
    """Crops in a group of their own each, of one size or several."""
    random = torch.Generator().manual_seed(0)
    views = [torch.randn(num_samples, 3, size, size, dtype=torch.float64, generator=random) for size in sizes]
    return Batch(views, torch.arange(num_samples), None)


def longhand(method: DINO, batch: Batch, progress: Progress) -> Tensor:
    """`DINOLoss` of main_dino.py: every large crop of the teacher with every other crop of the student."""
    sizes = {view.shape[-1]: None for view in batch.crops()}

    def scores(backbone, neck, prototypes, crops):
        passes = [torch.cat([crop for crop in crops if crop.shape[-1] == size]) for size in sizes]
        features = torch.cat([F.adaptive_avg_pool2d(backbone(x)[-1], 1).flatten(1) for x in passes if len(x)])
        weight = prototypes.weight / prototypes.weight.norm(dim=1, keepdim=True)
        weight = weight if prototypes.length is None else prototypes.length * weight
        return (F.normalize(neck(features), dim=1) @ weight.T).chunk(len(crops))

    with torch.no_grad():
        large = batch.crops()[:2]
        sizes = dict.fromkeys([large[0].shape[-1]])
        teacher = scores(method.teacher_backbone, method.teacher_neck, method.teacher_prototypes, large)
        tau = at(SHARP, progress)
        q = [torch.softmax((t - method.head.center) / tau, dim=1) for t in teacher]
    sizes = {view.shape[-1]: None for view in batch.crops()}
    student = scores(method.backbone, method.neck, method.head.prototypes, batch.crops())
    terms = [
        -(target * torch.log_softmax(z / 0.1, dim=1)).sum(dim=1).mean()
        for t, target in enumerate(q)
        for v, z in enumerate(student)
        if v != t
    ]
    assert len(terms) == 2 * len(student) - 2
    return sum(terms) / len(terms)


@pytest.mark.parametrize("learned_length", [False, True])
@pytest.mark.parametrize("sizes", [(8, 8), (8, 8, 4, 4, 4)])
def test_a_step_is_the_authors(sizes, learned_length):
    method, twin = (small(learned_length=learned_length) for _ in range(2))
    batch = multi_crop(6, sizes)
    actual = step(method, [batch])
    assert_close(actual, longhand_step(longhand(twin, batch, PROGRESS), twin))
    assert {name.split(".")[0] for name in actual.gradients} == {"backbone", "neck", "head"}


def test_groups_of_views_are_their_crops():
    method, batch = small(), multi_crop(6)
    views = [torch.cat(batch.views[:2]), torch.cat(batch.views[2:])]
    assert_close(step(method, [Batch(views, batch.index, None)]), step(small(), [batch]))


def test_a_transformer_with_crops_of_two_sizes():
    backbone = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, positions="learned", registers=1, drop_path=0.5
    )
    method, batch = small(backbone=backbone), multi_crop(6)
    loss = method(batch, PROGRESS, *method.targets([batch], PROGRESS)).value
    loss.backward()
    assert loss.isfinite() and method.backbone.pos_embed.grad.any()
    (first,), (second,) = (method.targets([batch], PROGRESS) for _ in range(2))
    assert torch.equal(first[0], second[0]), "the teacher drops nothing"


def test_targets_of_sinkhorn_use_all_prototypes_of_the_batch_equally():
    """Written longhand: three times columns, then rows, as `sinkhorn_knopp_teacher` of dinov2."""
    method, batch = small(), multi_crop(16)
    method.head.centering = "sinkhorn"
    parts = method.targets(pieces(batch, 8), PROGRESS)
    scores = torch.cat([each @ method.teacher_prototypes().T for each, _ in parts], dim=1).flatten(0, 1)
    q = torch.exp(scores / at(SHARP, PROGRESS))
    for _ in range(3):
        q = q / q.sum(dim=0) / 12
        q = q / q.sum(dim=1, keepdim=True) / 32
    for _, center in parts:
        torch.testing.assert_close(torch.softmax((scores - center) / at(SHARP, PROGRESS), dim=1), q * 32)
    before = method.head.center.clone()
    method.after_step(PROGRESS, step(method, pieces(batch, 8)).carry)
    assert torch.equal(method.head.center, before), "no moving average"


def test_signs_of_a_collapse():
    head = small().head
    scores, center = torch.eye(12).double()[[0, 0, 0, 1]], torch.zeros(12).double()
    center[3] = -0.5
    found = head.signs(scores, center)
    assert found["largest_prototype_pct"].value(found["largest_prototype_pct"].sums) == 75.0
    assert found["center_size"] == 0.5


def test_the_center_follows_the_mean_of_the_teachers_scores():
    method, batch = small(), multi_crop(6)
    carry = step(method, [batch]).carry
    before = method.head.center.clone()
    scores = carry["targets"].view(6, 2, 6) @ method.teacher_prototypes().T
    method.after_step(PROGRESS, carry)
    torch.testing.assert_close(method.head.center, 0.9 * before + 0.1 * scores.mean(dim=(0, 1)))


def test_the_teacher_has_everything_but_the_center():
    method = small(learned_length=True)
    moves = method.teachers(Progress(step=5, total_steps=10, steps_per_epoch=5, seed=0))
    assert [momentum for *_, momentum in moves] == pytest.approx([0.7] * 3)
    followers = {
        name for name, p in method.named_parameters() if any(p is q for m, *_ in moves for q in m.parameters())
    }
    assert followers == {name for name, p in method.named_parameters() if not p.requires_grad}
    assert method.chance_loss() == pytest.approx(math.log(12))


def test_scores_are_not_rounded_under_autocast():
    method = small().float()
    crops, targets = F.normalize(torch.randn(3, 4, 6), dim=2), F.normalize(torch.randn(2, 4, 6), dim=2)

    def loss() -> Tensor:
        scores = method.head.scores(targets, method.teacher_prototypes())
        return method.head(crops, scores, method.head.center, PROGRESS)

    plain = loss()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(), plain)


def test_bad_arguments_are_named():
    backbone = two_views.backbone(BN())
    with pytest.raises(ValueError, match="feat_dim is 5, but the neck gives 6"):
        DINO(backbone, DINONeck(FEATURES, 16, 6), DINOHead(5, 12))
    with pytest.raises(ValueError, match=r"teacher_temperature is 0\.0, expected a finite number above 0"):
        DINOHead(teacher_temperature=Scheduled(schedule="linear", start=0.0, end=0.07))
    with pytest.raises(ValueError, match="momentum is 2"):
        DINO(backbone, DINONeck(FEATURES, 16, 6), DINOHead(6, 12), momentum=2.0)
    method, batch = small(), multi_crop(6, (8,))
    with pytest.raises(ValueError, match=r"data\.views give 1 crop"):
        method(batch, PROGRESS, (torch.zeros(2, 6, 6, dtype=torch.float64), method.head.center))


def test_prototypes_have_unit_length():
    directions = Prototypes(5, 7, weight_norm=True, learned_length=True)
    torch.testing.assert_close(directions().norm(dim=1), torch.ones(7))


def test_recipes_are_as_published():
    vit = two_views.recipe("selfsup/dino/dino_vit-small-p16_8xb64-mcrop-2-8-coslr-100e_in1k-224-96.toml")
    assert (vit.global_batch, vit.epochs, vit.optimizer.lr, vit.optimizer.grad_clip.max_norm) == (512, 100, 1e-3, 3.0)
    assert [(view.num_views, view.size) for view in vit.data.views] == [(1, (224, 224)), (1, (224, 224)), (8, (96, 96))]
    start, end = (Progress(at, 1000, 10, 0) for at in (0, 1000))
    assert [at(vit.optimizer.weight_decay, place) for place in (start, end)] == pytest.approx([0.04, 0.4])
    assert [vit.model.teachers(place)[0][2] for place in (start, end)] == pytest.approx([0.996, 1.0])
    options = two_views.options_by_name(vit)
    assert options["head.prototypes.weight"]["freeze_epochs"] == 1 and vit.model.head.prototypes.length is None
    assert at(options["backbone.blocks.0.norm1.weight"]["initial_weight_decay"], end) == 0.0
    assert at(options["backbone.pos_embed"]["initial_weight_decay"], end) == 0.4
    assert vit.model.backbone.stochastic_depth.rates[::23] == pytest.approx([0.0, 0.1])
    assert vit.model.backbone.blocks[0].attn.heads == 6
    resnet = two_views.recipe("selfsup/dino/dino_resnet50_16xb64-mcrop-2-8-coslr-100e_in1k-224-96.toml")
    assert {recipe.optimizer.grad_clip.scope for recipe in (vit, resnet)} == {"parameter"}
    assert (resnet.global_batch, resnet.optimizer.lr, resnet.optimizer.weight_decay) == (1024, 0.12, 1e-4)
    rates = [resnet.lr.value(0.12, place, 10, 1000) for place in (0, 100, 1000)]
    assert rates == pytest.approx([1.2e-5, 0.12, 1e-6])
