"""ODC: a step of it against the paper written longhand, any cut of the batch, and ranks against one process."""

import copy
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from steps import Step, assert_close, step
from torch import Tensor, nn

from ranks import run_ranks
from sslrun.config import load
from sslrun.contract import Batch, Progress
from sslrun.errors import UsageError
from sslrun.methods.odc import ODC
from sslrun.nn.dropout import dropout_masks
from sslrun.nn.heads import ClsHead
from sslrun.nn.necks import ODCNeck
from sslrun.nn.norm import BN, set_groups
from sslrun.nn.resnet import ResNet
from sslrun.runtime import distributed

ROOT = Path(__file__).parents[2]
START = Progress(step=0, total_steps=40, steps_per_epoch=4, seed=1)
SAMPLES, CLUSTERS = 48, 5


def small(dropout: float = 0.4, min_cluster: int = 4, **options) -> ODC:
    torch.manual_seed(0)
    neck = ODCNeck(32, 12, 6, dropout=dropout, norm_cfg=BN(momentum=0.001, affine=False))
    method = ODC(
        ResNet(18, stem="small", base_width=4), neck, ClsHead(6, CLUSTERS),
        min_cluster=min_cluster, centroids_update_interval=2, **options,
    )  # fmt: skip
    method.prepare(SAMPLES)
    return method


def features(module: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    module.eval()
    with torch.no_grad():
        outputs = module(torch.randn(SAMPLES, 3, 16, 16, generator=generator))
    module.train()
    return outputs[distributed.share(SAMPLES)]


def started(**options) -> ODC:
    method = small(**options)
    for parameter, function in method.before_epoch(START, features):
        parameter.data.copy_(function(parameter.data))
    set_groups(method, 4, 1)
    return method


def batches_at(step: int, num_parts: int) -> list[Batch]:
    """A global batch of 16 in equal parts; one sample is in it twice."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(16, 3, 16, 16, generator=generator)
    index = torch.randperm(SAMPLES, generator=generator)[:16]
    index[13] = index[2]
    return [Batch([part], own, None) for part, own in zip(images.chunk(num_parts), index.chunk(num_parts), strict=True)]


def step_and_after(method: ODC, at: int, batches: list[Batch]) -> Step:
    """A step of this rank, then a plain update of the weights and what follows a step."""
    set_groups(method, 4, len(batches[0].index) // 4)
    done = step(method, batches, Progress(at, 40, 4, 1))
    with torch.no_grad():
        for name, gradient in done.gradients.items():
            method.get_parameter(name).sub_(0.05 * gradient)
    method.after_step(Progress(at + 1, 40, 4, 1), done.carry)
    return done


def train(num_steps: int, accumulation: int) -> tuple[list[float], dict[str, Tensor]]:
    distributed.init(torch.device("cpu"))
    method = started()
    rank, ranks = distributed.rank(), distributed.world_size()
    values = []
    for at in range(num_steps):
        mine = batches_at(at, ranks * accumulation)[rank * accumulation : (rank + 1) * accumulation]
        values.append(step_and_after(method, at, mine).loss)
    distributed.shutdown()
    return values, method.state_dict()


def test_it_starts_with_k_means_of_what_the_neck_makes():
    method, twin = small(), small()
    state = torch.get_rng_state()
    rewrites = method.before_epoch(START, features)
    assert torch.equal(torch.get_rng_state(), state)
    twin.eval()
    with torch.no_grad():
        images = torch.randn(SAMPLES, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        rows = F.normalize(twin.neck(twin.backbone(images)[-1]), dim=1)
    torch.testing.assert_close(method.clusters.bank.rows, rows)
    assert len(method.clusters.labels.unique()) == CLUSTERS
    for cluster in range(CLUSTERS):
        mean = rows[method.clusters.labels == cluster].mean(0)
        torch.testing.assert_close(method.clusters.centroids[cluster], mean, atol=1e-6, rtol=1e-5)
    assert {parameter for parameter, _ in rewrites} == set(method.head.parameters())
    labels = method.clusters.labels.clone()
    assert method.before_epoch(Progress(4, 40, 4, 1), features) == []  # later epochs go on
    assert torch.equal(method.clusters.labels, labels)


def test_loss_is_the_weighted_cross_entropy_of_the_papers_head():
    method = started(dropout=0.4)
    with torch.no_grad():
        method.head.fc.weight.mul_(100)
    method = method.double()
    (batch,) = batches_at(0, 1)
    set_groups(method, 4, 4)
    twin = copy.deepcopy(method)
    progress = Progress(3, 40, 4, 1)
    counts = method.clusters.labels.bincount(minlength=CLUSTERS).tolist()
    assert len(set(counts)) > 1
    (mask,) = dropout_masks(1, (16, 12), 0.4, progress.generator().initial_seed(), torch.device("cpu"))
    pooled = twin.backbone(batch.views[0].double())[-1].mean(dim=(2, 3))
    hidden = pooled @ twin.neck.fc0.weight.T + twin.neck.fc0.bias
    groups = []
    for group in hidden.split(4):
        groups.append((group - group.mean(0)) / (group.var(0, correction=0) + 1e-5).sqrt())
    dropped = torch.cat(groups).clamp(min=0) * mask
    embeddings = (dropped @ twin.neck.fc1.weight.T + twin.neck.fc1.bias).clamp(min=0)
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for row, sample in zip(embeddings, batch.index.tolist(), strict=True):
        label = int(method.clusters.labels[sample])
        scores = twin.head.fc.weight @ row + twin.head.fc.bias
        weight = counts[label] ** -0.5
        total = total - weight * torch.log(scores[label].exp() / scores.exp().sum())
        weights += weight
    expected = total / weights
    expected.backward()

    (target,) = method.targets([batch], progress)
    loss = method(Batch([batch.views[0].double()], batch.index, None), progress, target)
    loss.value.backward()
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, parameter), other in zip(method.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-7, msg=name)
    assert torch.equal(loss.carry["index"], batch.index)
    torch.testing.assert_close(loss.carry["features"].double(), F.normalize(embeddings, dim=1), atol=1e-6, rtol=1e-5)


def test_after_a_step_comes_the_bank_then_centroids_then_small_clusters(monkeypatch):
    method = started(deal_with_small_clusters_interval=3, min_cluster=SAMPLES)
    calls = []
    for name in ("update", "update_centroids", "tend_small"):
        real = getattr(method.clusters, name)
        monkeypatch.setattr(method.clusters, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    rows = F.normalize(torch.rand(16, 6), dim=1)
    for done in range(1, 7):
        calls.append(str(done))
        method.after_step(Progress(done, 40, 4, 1), {"index": batches_at(done, 1)[0].index, "features": rows})
    assert calls == [
        "1", "update", "2", "update", "update_centroids", "3", "update", "tend_small",
        "4", "update", "update_centroids", "5", "update", "6", "update", "update_centroids", "tend_small",
    ]  # fmt: skip


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_small_cluster_is_dissolved_one_step_later(is_resumed):
    """And at the same step if the run was resumed in between, where the host has not been told yet."""
    method = started(momentum=1.0)
    smallest = int(method.clusters.counts.argmin())
    members = (method.clusters.labels == smallest).nonzero().flatten()
    assert len(members) >= 4
    elsewhere = method.clusters.centroids[(smallest + 1) % CLUSTERS]
    dissolved = []
    for at, index in enumerate([members[:0], members[:-2], members[:1]], start=1):
        if at == 3 and is_resumed:
            method, state = small(momentum=1.0), method.state_dict()
            method.load_state_dict(state)
        with mock.patch.object(method.clusters, "tend_small") as tend_small:
            carry = {"index": index, "features": F.normalize(elsewhere.expand(len(index), -1), dim=1)}
            method.after_step(Progress(at, 40, 4, 1), carry)
        dissolved.append(tend_small.called)
        assert int(method.clusters.counts[smallest]) == (len(members) if at == 1 else 2)
    assert dissolved == [False, False, True]


def test_the_cut_of_a_global_batch_does_not_show():
    """Groups of 4 at once or one after the other, dropout and weights included."""
    whole, cut = started(), started()
    for at in range(3):
        expected = step_and_after(whole, at, batches_at(at, 1))
        assert_close(step_and_after(cut, at, batches_at(at, 4)), expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(whole.clusters.labels, cut.clusters.labels)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_compute_what_one_process_does(world_size):
    values, state = train(3, 2)
    ranks = run_ranks(train, world_size, 3, 1)
    for other_values, other_state in ranks:
        assert other_values == pytest.approx(values, rel=1e-5)
        for name in ("clusters.labels", "clusters.counts"):
            assert torch.equal(other_state[name], state[name])
        torch.testing.assert_close(other_state["clusters.bank.rows"], state["clusters.bank.rows"], atol=1e-5, rtol=1e-4)
    for name, tensor in ranks[0][1].items():
        if name.startswith("clusters."):
            assert torch.equal(tensor, ranks[1][1][name]), name


def test_metrics_and_chance():
    method = started()
    step_and_after(method, 0, batches_at(0, 1))
    (batch,) = batches_at(1, 1)
    (target,) = method.targets([batch], START)
    metrics = method(batch, START, target).metrics
    assert metrics["smallest_cluster"] == method.clusters.counts.min() > 0
    assert metrics["largest_cluster"] == method.clusters.counts.max()
    assert 0 < metrics["labels_changed_pct"] <= 100
    assert method.chance_loss() == pytest.approx(math.log(CLUSTERS))


def test_a_neck_without_dropout_needs_no_mask():
    method = started(dropout=0.0)
    (target,) = method.targets(batches_at(0, 1), START)
    assert target[2] is None and method(batches_at(0, 1)[0], START, target).value.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"min_cluster": -1}, "min_cluster is -1"),
        ({"centroids_update_interval": 0}, "centroids_update_interval is 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ODC(ResNet(18, base_width=4), ODCNeck(32, 8, 6), ClsHead(6, 4), **options)


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match="dropout is 1"):
        ODCNeck(32, 8, 6, dropout=1)
    with pytest.raises(UsageError, match="4 samples cannot be put into 5 clusters"):
        ODC(ResNet(18, base_width=4), ODCNeck(32, 8, 6), ClsHead(6, 5)).prepare(4)


def test_the_recipe_is_the_published_one():
    config = load(str(ROOT / "configs/odc.toml"))
    assert config.name == "odc_resnet50_8xb64-steplr-440e_in1k"
    values = config.values
    model = values["model"]
    neck, head = model.pop("neck"), model.pop("head")
    assert model.pop("backbone")["norm_cfg"] == {"type": "SyncBN"}
    assert model == {
        "type": "ODC", "momentum": 0.5, "min_cluster": 20, "centroids_update_interval": 10,
        "deal_with_small_clusters_interval": 1, "reweight_power": 0.5,
    }  # fmt: skip
    assert neck == {
        "type": "ODCNeck", "in_channels": 2048, "hid_channels": 512, "out_channels": 256, "dropout": 0.5,
        "norm_cfg": {"type": "SyncBN", "momentum": 0.001, "affine": False},
    }  # fmt: skip
    assert head == {"type": "ClsHead", "in_channels": 256, "num_classes": 10000}
    assert values["optimizer"] == {
        "type": "SGD", "lr": 0.06, "momentum": 0.9, "weight_decay": 1e-5,
        "paramwise": [{"match": r"^head\.", "momentum": 0.0}],
    }  # fmt: skip
    assert values["lr"] == {"policy": "Step", "step": [400], "gamma": 0.4, "by": "epoch"}
    assert (values["epochs"], values["global_batch"], values["data"]["samples_per_gpu"]) == (440, 512, 64)
    assert values["data"]["views"] == load(str(ROOT / "configs/deepcluster.toml")).values["data"]["views"]
