"""MoCo against longhand versions of its papers. (Cuts of the batch: test_cuts.py.)"""

import math

import pytest
import torch
import torch.nn.functional as F
from steps import PROGRESS
from two_views import random_batch

from sslrun.contract import Progress
from sslrun.methods.moco import MoCo
from sslrun.nn.heads import ContrastiveHead
from sslrun.nn.momentum import teacher_of
from sslrun.nn.necks import MoCoV2Neck
from sslrun.nn.norm import set_groups
from sslrun.nn.queue_and_bank import Queue
from sslrun.nn.resnet import ResNet


def small(queue_len: int = 24, **options) -> MoCo:
    torch.manual_seed(0)
    backbone = ResNet(18, stem="small", base_width=4)
    neck = MoCoV2Neck(in_channels=32, hid_channels=16, out_channels=8)
    return MoCo(backbone, neck, ContrastiveHead(temperature=0.2), queue_len=queue_len, feat_dim=8, **options).double()


def test_loss_is_the_papers():
    """Eq. 1 of arXiv 1911.05722 with loops, on normalized vectors."""
    torch.manual_seed(0)
    queries = torch.randn(5, 4, dtype=torch.float64) * 3
    keys = F.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1)
    queue = F.normalize(torch.randn(7, 4, dtype=torch.float64), dim=1)
    total, hits = 0.0, 0
    for q, k in zip(queries.tolist(), keys.tolist(), strict=True):
        length = math.sqrt(sum(x * x for x in q))
        q = [x / length for x in q]
        positive = sum(a * b for a, b in zip(q, k, strict=True)) / 0.2
        negatives = [sum(a * b for a, b in zip(q, n, strict=True)) / 0.2 for n in queue.tolist()]
        total -= math.log(math.exp(positive) / (math.exp(positive) + sum(math.exp(n) for n in negatives)))
        hits += positive > max(negatives)
    loss, top1 = ContrastiveHead(temperature=0.2)(queries, keys, queue)
    assert float(loss) == pytest.approx(total / 5, rel=1e-6)
    assert float(top1) == pytest.approx(hits / 5)
    loss, _ = ContrastiveHead(temperature=0.07)(queries, keys, queue)
    assert float(loss) != pytest.approx(total / 5, rel=1e-2)


def test_gradient_is_the_papers():
    """d loss / d q = (sum_j p_j k_j - k_+) / T on the sphere, projected onto its tangent and divided by the length."""
    torch.manual_seed(0)
    queries = torch.randn(3, 4, requires_grad=True)
    keys = F.normalize(torch.randn(3, 4), dim=1)
    queue = F.normalize(torch.randn(6, 4), dim=1)
    loss, _ = ContrastiveHead(temperature=0.2)(queries, keys, queue)
    (gradient,) = torch.autograd.grad(loss, queries)
    for i in range(3):
        q = queries.detach()[i].double()
        length = q.norm()
        q = q / length
        candidates = torch.cat([keys[i : i + 1], queue]).double()
        probabilities = (candidates @ q / 0.2).softmax(0)
        on_sphere = (probabilities @ candidates - candidates[0]) / 0.2
        expected = (on_sphere - (on_sphere @ q) * q) / length / 3
        torch.testing.assert_close(gradient[i].double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("length", "pushes"), [(5, [2, 2, 2, 2]), (4, [4, 4]), (3, [7, 2]), (6, [1, 5, 3, 6, 13])])
def test_queue_is_first_in_first_out(length, pushes):
    queue = Queue(length, 2)
    expected = queue.rows.clone()
    where, value = 0, 0.0
    for pushed in pushes:
        rows = torch.arange(value, value + pushed).unsqueeze(1).expand(-1, 2)
        for row in rows:  # one at a time, oldest first
            expected[where % length] = row
            where += 1
        queue.push(rows)
        value += pushed
        torch.testing.assert_close(queue.rows, expected, atol=0, rtol=0)
    assert int(queue.oldest) == sum(pushes) % length


def test_queue_starts_on_the_sphere():
    torch.testing.assert_close(Queue(9, 4).rows.norm(dim=1), torch.ones(9))
    with pytest.raises(ValueError, match="is empty"):
        Queue(0, 4)


def test_keys_come_from_shuffled_groups():
    """Longhand: permute the images, run the key encoder group by group, undo the permutation."""
    method = small()
    set_groups(method, 4, 3)
    batch = random_batch(12, 16)
    (keys,) = method.targets([batch], PROGRESS)
    order = torch.randperm(12, generator=PROGRESS.generator()).tolist()
    twin = small()
    set_groups(twin, 4, 1)
    expected = torch.empty_like(keys)
    for g in range(3):
        members = order[4 * g : 4 * g + 4]
        embedded = twin.key_neck(twin.key_backbone(batch.crops()[1][members])[-1])
        expected[members] = F.normalize(embedded, dim=1)
    torch.testing.assert_close(keys, expected, atol=1e-5, rtol=1e-5)

    in_place = torch.empty_like(keys)
    for g in range(3):
        embedded = twin.key_neck(twin.key_backbone(batch.crops()[1][4 * g : 4 * g + 4])[-1])
        in_place[4 * g : 4 * g + 4] = F.normalize(embedded, dim=1)
    assert (keys - in_place).abs().max() > 0.05, "the shuffle changes nothing: statistics leak from query to key"


def test_the_shuffle_changes_with_the_step():
    batch = random_batch(12, 16)
    method = small()
    set_groups(method, 4, 3)
    (first,) = method.targets([batch], PROGRESS)
    (again,) = method.targets([batch], PROGRESS)
    (later,) = method.targets([batch], Progress(4, 10, 5, 1))
    torch.testing.assert_close(first, again, atol=0, rtol=0)
    assert not torch.allclose(first, later)


def test_teacher_starts_equal_and_apart():
    method = small()
    for (name, key), query in zip(method.key_backbone.named_parameters(), method.backbone.parameters(), strict=True):
        assert torch.equal(key, query) and key.data_ptr() != query.data_ptr(), name
    student = torch.nn.Linear(2, 2)
    assert not any(p.requires_grad for p in teacher_of(student).parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_after_step_pushes_the_keys_in_order():
    method = small(queue_len=10)
    keys = F.normalize(torch.randn(4, 8, dtype=torch.float64), dim=1)
    method.after_step(PROGRESS, {"keys": keys})
    torch.testing.assert_close(method.queue.rows[:4], keys)
    assert int(method.queue.oldest) == 4


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="feat_dim is 9, but the neck gives 8"):
        MoCo(ResNet(18, base_width=4), MoCoV2Neck(32, 16, 8), ContrastiveHead(), queue_len=8, feat_dim=9)
    with pytest.raises(ValueError, match="momentum is 2"):
        small(momentum=2)
