"""iBOT, DINOv2 and DINOv3 against their papers and the authors' code, longhand. (Cuts of the batch: test_cuts.py.)"""

import math

import pytest
import torch
import torch.nn.functional as F
import two_views
from steps import PROGRESS, assert_close, longhand_step, pieces, step
from torch import Tensor

from sslrun.contract import Batch, PatchMask, Progress
from sslrun.errors import UsageError
from sslrun.methods.dinov2 import DINOv2
from sslrun.methods.dinov3 import DINOv3
from sslrun.methods.ibot import IBOT
from sslrun.nn.gram import gram_loss
from sslrun.nn.koleo import koleo
from sslrun.nn.masked_distillation import MaskedDistillation
from sslrun.nn.necks import DINONeck
from sslrun.nn.norm import BN
from sslrun.nn.self_distillation import DINOHead
from sslrun.nn.vit import VisionTransformer
from sslrun.scheduled import Scheduled, at

SHARP = Scheduled(schedule="linear", start=0.04, end=0.07)
LATE = Scheduled(schedule="linear", start=0.0, end=1.0)
GROUP = 4
SIZES = (12, 12, 8, 8)


def backbone(positions: str = "learned") -> VisionTransformer:
    return VisionTransformer(
        img_size=12, patch_size=4, embed_dim=16, depth=2, num_heads=2, positions=positions, mask_token=True,
        patch_tokens=True,
    )  # fmt: skip


def perturbed(method: MaskedDistillation) -> MaskedDistillation:
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the teacher and the centers differ from the start
        for tensor in [*method.parameters(), method.head.center, method.patch_center]:
            tensor.add_(0.1 * torch.randn(tensor.shape, dtype=torch.float64, generator=random))
    return method


def small(own_head: bool = False) -> IBOT:
    torch.manual_seed(0)
    own = {"patch_neck": DINONeck(16, 8, 5), "patch_head": DINOHead(5, 9, teacher_temperature=0.06)} if own_head else {}
    head = DINOHead(6, 12, teacher_temperature=SHARP)
    return perturbed(IBOT(backbone(), DINONeck(16, 8, 6), head, patch_weight=LATE, **own).double())


def small_v2(centering: str = "sinkhorn", group: int = GROUP) -> DINOv2:
    torch.manual_seed(0)
    head, patch_head = (DINOHead(6, count, teacher_temperature=SHARP, centering=centering) for count in (12, 9))
    necks = DINONeck(16, 8, 6), DINONeck(16, 8, 6)
    method = DINOv2(backbone(), necks[0], head, group, necks[1], patch_head)
    return perturbed(method.double())


def small_v3(gram_scale: float = 2.0, **options) -> DINOv3:
    torch.manual_seed(0)
    plain = {"teacher_temperature": SHARP, "centering": "sinkhorn", "weight_norm": False}
    heads = [DINOHead(6, count, **plain) for count in (12, 9)]
    necks = DINONeck(16, 8, 6), DINONeck(16, 8, 6)
    options = {"gram_weight": LATE, "gram_scale": gram_scale, "small_weight": 0.5} | options
    return perturbed(DINOv3(backbone(), necks[0], heads[0], necks[1], heads[1], GROUP, **options).double())


def multi_crop(samples: int, sizes: tuple[int, ...] = SIZES) -> Batch:
    """Crops in a group of their own each; of two large ones every other has some masked patches."""
    random = torch.Generator().manual_seed(0)
    views = [torch.randn(samples, 3, size, size, dtype=torch.float64, generator=random) for size in sizes]
    masks: list[PatchMask | None] = [None] * len(sizes)
    for crop in range(2):
        hidden = torch.rand(samples, 9, generator=random) < 0.4
        hidden[crop::2] = False
        hidden[1 - crop :: 2, 0] = True
        masks[crop] = PatchMask(hidden, int(hidden.sum()))
    return Batch(views, torch.arange(samples), None, masks)


def q_of(scores: Tensor, center: Tensor, temperature: float, is_sinkhorn: bool) -> Tensor:
    """`softmax_center_teacher` and `sinkhorn_knopp_teacher` of dinov2."""
    if not is_sinkhorn:
        return torch.softmax((scores - center) / temperature, dim=1)
    q = torch.exp(scores / temperature)
    for _ in range(3):
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
        q = q / q.sum(dim=1, keepdim=True) / len(q)
    return q * len(q)


def longhand(method: MaskedDistillation, batch: Batch, progress: Progress) -> Tensor:
    """One image, one crop, one patch after the other."""
    patch_head, samples = method.patch_head or method.head, len(batch.index)
    is_sinkhorn = method.head.centering == "sinkhorn"

    def scores(neck, weight, features):
        directions = weight / weight.norm(dim=1, keepdim=True) if method.head.prototypes.weight_norm else weight
        return F.normalize(neck(features), dim=-1) @ directions.T

    def outputs(network, image, hidden):
        tokens = network.patch_embed(image.unsqueeze(0))[0]
        if hidden is not None:
            tokens = torch.stack([network.mask_token[0] if h else t for t, h in zip(tokens, hidden, strict=True)])
        positions = network._positions(image.shape[1] // 4, image.shape[2] // 4)[0]
        tokens = torch.cat([network.cls_token[0], tokens]) + positions
        out = network.norm(network.blocks(tokens.unsqueeze(0)))[0]
        return out[0], out[1:]

    whole = batch.views
    if isinstance(method, DINOv3):
        side = round(whole[0].shape[-1] / method.gram_scale)
        smaller = [F.interpolate(crop, (side, side), mode="bicubic", antialias=True) for crop in whole[:2]]
        batch = Batch([*smaller, *whole[2:]], batch.index, None, batch.masks)
    hidden = [mask.hidden.tolist() for mask in batch.masks[:2]]
    with torch.no_grad():
        teacher = [[outputs(method.teacher_backbone, image, None) for image in crop] for crop in batch.views[:2]]
        class_q = q_of(
            torch.stack([
                scores(method.teacher_neck, method.teacher_prototypes.weight, token)
                for crop in teacher for token, _ in crop
            ]), method.head.center, at(method.head.teacher_temperature, progress), is_sinkhorn,
        ).unflatten(0, (2, samples))  # fmt: skip
        masked = [(c, i, t) for c in range(2) for i in range(samples) for t in range(9) if hidden[c][i][t]]
        patch_neck = method.teacher_patch_neck or method.teacher_neck
        patch_weights = (method.teacher_patch_prototypes or method.teacher_prototypes).weight
        patch_q = q_of(
            torch.stack([scores(patch_neck, patch_weights, teacher[c][i][1][t]) for c, i, t in masked]),
            method.patch_center, at(patch_head.teacher_temperature, progress), is_sinkhorn,
        )  # fmt: skip
    student = [
        [outputs(method.backbone, image, hidden[c][i] if c < 2 else None) for i, image in enumerate(crop)]
        for c, crop in enumerate(batch.views)
    ]
    class_terms = []
    for t in range(2):
        for s, crop in enumerate(student):
            for i in range(samples):
                if s != t:
                    z = scores(method.neck, method.head.prototypes.weight, crop[i][0])
                    weight = 0.5 if s > 1 and isinstance(method, DINOv3) else 1.0
                    class_terms.append(-weight * (class_q[t][i] * torch.log_softmax(z / 0.1, dim=0)).sum())
    assert len(class_terms) == samples * (2 * len(student) - 2)
    crops: dict[tuple[int, int], list[Tensor]] = {}
    for (c, i, t), q in zip(masked, patch_q, strict=True):
        z = scores(method.patch_neck or method.neck, patch_head.prototypes.weight, student[c][i][1][t])
        crops.setdefault((c, i), []).append(-(q * torch.log_softmax(z / 0.1, dim=0)).sum())
    patch_loss = sum(sum(terms) / len(terms) for terms in crops.values()) / (2 * samples)
    loss = sum(class_terms) / len(class_terms) + at(method.patch_weight, progress) * patch_loss
    if method.koleo_group:
        for crop in student[:2]:
            loss = loss + 0.1 * longhand_koleo(torch.stack([token for token, _ in crop]), method.koleo_group)
    if isinstance(method, DINOv3):
        squares = []
        for crop, images in zip(student[:2], whole[:2], strict=True):
            for (_, own), image in zip(crop, images, strict=True):
                with torch.no_grad():
                    large = outputs(method.gram_backbone, image, None)[1]
                side = round(len(large) ** 0.5)
                maps = large.T.reshape(1, -1, side, side)
                given = F.interpolate(maps, (3, 3), mode="bicubic", align_corners=False)[0].flatten(1).T
                for i in range(9):
                    for j in range(9):
                        pair = [F.cosine_similarity(patches[i], patches[j], dim=0) for patches in (own, given)]
                        squares.append((pair[0] - pair[1]) ** 2)
        loss = loss + at(method.gram_weight, progress) * torch.stack(squares).mean()
    return loss


def longhand_koleo(features: Tensor, group: int) -> Tensor:
    terms = []
    unit = [each / each.norm() for each in features]
    for i, one in enumerate(unit):
        others = [unit[j] for j in range(len(unit)) if j // group == i // group and j != i]
        terms.append(-torch.log(torch.stack([(one - other + 1e-8).norm() for other in others]).min() + 1e-8))
    return torch.stack(terms).mean()


LARGE = (24, 24, 8, 8)
"""Sides of crops of which the anchor sees the first two whole, the student at half the side."""


@pytest.mark.parametrize(
    "make, sizes",
    [
        (small, SIZES),
        (lambda: small(own_head=True), SIZES),
        (small_v2, SIZES),
        (lambda: small_v2("mean"), SIZES),
        (lambda: small_v3(1.0), SIZES),
        (small_v3, LARGE),
        (lambda: small_v3(4 / 3), (16, 16, 8, 8)),
    ],
)
def test_a_step_is_the_authors(make, sizes):
    method, twin, batch = make(), make(), multi_crop(8, sizes)
    actual = step(method, [batch])
    assert_close(actual, longhand_step(longhand(twin, batch, PROGRESS), twin))
    expected = {"backbone", "neck", "head"} | ({"patch_neck", "patch_head"} if method.patch_head else set())
    assert {name.split(".")[0] for name in actual.gradients} == expected
    assert "backbone.mask_token" in actual.gradients


def test_groups_of_views_are_their_crops():
    batch = multi_crop(4)
    (first, second), views = batch.masks[:2], [torch.cat(batch.views[:2]), torch.cat(batch.views[2:])]
    both = PatchMask(torch.cat([first.hidden, second.hidden]), first.num_hidden + second.num_hidden)
    assert_close(step(small(), [Batch(views, batch.index, None, [both, None])]), step(small(), [batch]))


def test_the_loss_of_patches_may_start_late():
    method, start = small(own_head=True), Progress(0, 10, 5, 1)
    result = step(method, [multi_crop(4)], start)
    assert not result.gradients["patch_head.prototypes.weight"].any() and result.gradients["neck.mlp.0.weight"].any()


def test_centers_follow_the_means_of_the_teachers_scores():
    """That of patches over the masked ones of the global batch, whatever their number in each sample."""
    method, batch = small(own_head=True), multi_crop(6)
    whole, cut = step(method, [batch]), step(method, pieces(batch, 2))
    torch.testing.assert_close(whole.carry, cut.carry)
    before = method.head.center.clone(), method.patch_center.clone()
    (targets,) = method.targets([batch], PROGRESS)
    classes = targets.classes.flatten(0, 1) @ method.teacher_prototypes().T
    patches = targets.patches @ method.teacher_patch_prototypes().T
    method.after_step(PROGRESS, whole.carry)
    torch.testing.assert_close(method.head.center, 0.9 * before[0] + 0.1 * classes.mean(dim=0))
    torch.testing.assert_close(method.patch_center, 0.9 * before[1] + 0.1 * patches.mean(dim=0))


def test_pixels_under_the_mask_reach_the_teacher_alone():
    method, batch = small(), multi_crop(4)
    hidden = batch.masks[0].hidden.view(4, 1, 3, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = [torch.where(hidden, 1 - batch.views[0], batch.views[0]), *batch.views[1:]]
    changed = Batch(other, batch.index, None, batch.masks)
    (before,), (after,) = (method.targets([each], PROGRESS) for each in (batch, changed))
    assert not torch.equal(before.classes[0], after.classes[0]) and torch.equal(before.classes[1], after.classes[1])
    assert torch.equal(*(method(each, PROGRESS, before).value for each in (batch, changed)))


def test_terms_are_logged_as_shares_of_the_loss_of_chance():
    method, batch = small(own_head=True), multi_crop(4)
    with torch.no_grad():
        for head in (method.head, method.patch_head):
            head.student_temperature = 1e9  # all prototypes have the same probability
        metrics = method(batch, PROGRESS, *method.targets([batch], PROGRESS)).metrics
    assert float(metrics["class_loss_of_chance"]) == pytest.approx(1.0, abs=1e-6)
    pooled = metrics["patch_loss_of_chance"]
    assert float(pooled.value(pooled.sums)) == pytest.approx(1.0, abs=1e-6) and pooled.sums[1] == 4


def test_the_anchor_becomes_the_teacher_when_it_is_due():
    method = small_v3(gram_start=3, gram_interval=2, gram_refreshes=2)
    due = [step for step in range(12) if method.teachers(Progress(step, 20, 5, 1))[-1][0] is method.gram_backbone]
    assert due == [3, 5, 7]
    once = small_v3(gram_start=3)
    assert [step for step in range(12) if len(once.teachers(Progress(step, 20, 5, 1))) == 6] == [3]
    for anchor, teacher, momentum in method.teachers(Progress(3, 20, 5, 1))[-1:]:
        assert momentum == 0.0 and anchor is method.gram_backbone and teacher is method.teacher_backbone


def test_without_its_weight_there_is_no_anchor():
    method, batch = small_v3(gram_weight=0.0), multi_crop(8, LARGE)  # which are reduced all the same
    assert method.gram_backbone is None
    assert "gram_loss" not in method(batch, PROGRESS, *method.targets([batch], PROGRESS)).metrics
    early = Progress(0, 20, 5, 1)  # the weight rises from 0
    late = small_v3()
    assert late.targets([batch], early)[0].anchored is None
    (targets,) = late.targets([batch], PROGRESS)
    assert targets.anchored.shape == (16, 9, 16) and "gram_loss" in late(batch, PROGRESS, targets).metrics


def test_gram_compares_similarities_alone():
    random = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 7, 5, dtype=torch.float64, generator=random)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=random))
    lengths = torch.rand(2, 7, 1, dtype=torch.float64, generator=random) + 0.5
    assert float(gram_loss(patches, lengths * patches @ turn)) == pytest.approx(0, abs=1e-28)
    assert float(gram_loss(patches, patches.flip(1))) > 0.01


def test_koleo_is_that_of_its_groups():
    features = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    expected = (koleo(features[:4], 4) + koleo(features[4:], 4)) / 2
    torch.testing.assert_close(koleo(features, 4), expected)
    assert not torch.isclose(koleo(features, 8), expected)
    torch.testing.assert_close(koleo(features, 4), longhand_koleo(features, 4))
    corners = torch.eye(4, dtype=torch.float64)  # all at distance sqrt(2)
    assert float(koleo(corners, 4)) == pytest.approx(-math.log(math.sqrt(2)))
    equal = torch.ones(2, 3, requires_grad=True)
    koleo(equal, 2).backward()
    assert equal.grad.isfinite().all()
    with pytest.raises(UsageError, match="koleo_group is 3, expected 2 or more and a divisor of the micro-batch 8"):
        koleo(features, 3)


def test_bad_arguments_and_masks_are_named():
    head = DINOHead(6, 12)
    with pytest.raises(ValueError, match="mask_token = true"):
        IBOT(VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2), DINONeck(16, 8, 6), head)
    with pytest.raises(ValueError, match="cannot have batch normalization"):
        IBOT(backbone(), DINONeck(16, 8, 6, norm_cfg=BN()), head)
    with pytest.raises(ValueError, match="feat_dim is 6, but the neck gives 5"):
        IBOT(backbone(), DINONeck(16, 8, 6), head, patch_neck=DINONeck(16, 8, 5))
    with pytest.raises(ValueError, match="koleo_group is 1"):
        small_v2(group=1)
    batch = multi_crop(4)
    first, second = batch.masks[:2]
    for masks in ([], [first, None, None, None], [None, first, second, None], [first, second, first, None]):
        with pytest.raises(UsageError, match="the first 2 crops"):
            small().targets([Batch(batch.views, batch.index, None, masks)], PROGRESS)
    none = PatchMask(torch.zeros(4, 9, dtype=torch.bool), 0)
    with pytest.raises(UsageError, match="the masks of 4 samples hide no patch"):
        small().targets([Batch(batch.views, batch.index, None, [none, none, None, None])], PROGRESS)
    wrong = PatchMask(torch.ones(4, 4, dtype=torch.bool), 16)
    with pytest.raises((UsageError, RuntimeError)):
        method, given = small(), Batch(batch.views, batch.index, None, [wrong, wrong, None, None])
        method(given, PROGRESS, *method.targets([given], PROGRESS))


def test_recipes_are_as_published():
    vit = two_views.recipe("ibot.toml")
    assert (vit.global_batch, vit.epochs, vit.optimizer.lr, vit.optimizer.grad_clip.max_norm) == (1024, 800, 2e-3, 3.0)
    assert [(view.num_views, view.size[0]) for view in vit.data.views] == [(1, 224), (1, 224), (10, 96)]
    masks = [view.mask for view in vit.data.views]
    assert masks[2] is None and all((m.low, m.high, m.probability, m.samples) == (0.1, 0.5, 0.5, 64) for m in masks[:2])
    assert (vit.model.head.num_prototypes, vit.model.patch_head, vit.model.patch_neck) == (8192, None, None)
    places = [Progress(at, 800 * 1251, 1251, 0) for at in (0, 30 * 1251, 800 * 1251)]
    temperatures = [at(vit.model.head.teacher_temperature, place) for place in places]
    assert temperatures == pytest.approx([0.04, 0.07, 0.07]) and vit.model.head.prototypes.length is not None
    assert two_views.options_by_name(vit)["head.prototypes.weight"]["freeze_iters"] == 1251

    large = two_views.recipe("dinov2.toml")
    assert (large.global_batch, large.data.samples_per_gpu, large.model.koleo_group) == (2048, 64, 64)
    assert large.optimizer.lr == pytest.approx(4e-3 * math.sqrt(2048 / 1024), rel=1e-3)
    assert (large.model.head.num_prototypes, large.model.head.centering, large.model.patch_head) == (
        65536,
        "mean",
        None,
    )
    assert [at(large.model.momentum, Progress(step, 125_000, 625, 0)) for step in (0, 125_000)] == [0.992, 1.0]
    options = two_views.options_by_name(large)
    assert options["backbone.patch_embed.proj.weight"]["lr"] == pytest.approx(0.2 * large.optimizer.lr)
    assert options["backbone.blocks.0.ls1.gamma"]["weight_decay"] == 0.0

    folder = "selfsup/dinov2/dinov2_vit-large-p14_96xb32-mcrop-2-8-coslr-1500e_in1k-224-98.toml"
    apart = two_views.recipe(folder)
    assert (apart.global_batch, apart.data.samples_per_gpu, apart.model.koleo_group) == (3072, 32, 32)
    assert [view.size[0] for view in apart.data.views] == [224, 224, 98] and apart.data.views[0].mask.patch_size == 14
    for head, neck in ((apart.model.head, apart.model.neck), (apart.model.patch_head, apart.model.patch_neck)):
        assert (head.num_prototypes, head.centering, neck.out_channels) == (131072, "sinkhorn", 384)
    assert apart.optimizer.lr == pytest.approx(2e-4 * math.sqrt(3), rel=1e-3)
    assert apart.model.backbone.patch_embed.proj.kernel_size == (14, 14)
    assert {name for name, group in two_views.options_by_name(apart).items() if group.get("freeze_iters")} == {
        f"{head}.prototypes.{part}" for head in ("head", "patch_head") for part in ("weight", "length")
    }
