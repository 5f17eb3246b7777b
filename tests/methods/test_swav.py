"""SwAV against its paper written longhand, and against itself on more ranks."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from steps import Step, assert_close, piece, step

from ranks import run_ranks
from sslrun.config import load
from sslrun.contract import Backbone, Batch, Progress
from sslrun.methods.swav import SwAV, SwAVHead
from sslrun.nn.necks import NonLinearNeck
from sslrun.nn.norm import RunningStatistics
from sslrun.optim.groups import ParamRule
from sslrun.optim.optimizers import SGD
from sslrun.runtime import distributed
from sslrun.runtime.executor import LocalExecutor
from sslrun.training import train_step

ROOT = Path(__file__).parents[2]
DIM, PROTOTYPES = 4, 7
SIZES = (6, 6, 3, 3, 3)  # pixels of the crops: groups of two and three


class Mean(Backbone, listed=False):
    """A backbone without parameters: the image's channels as they are. It remembers what it was called with."""

    num_features = 3

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        return [images]


def small(crops_for_assign=(0, 1), **options) -> SwAV:
    torch.manual_seed(0)
    neck = NonLinearNeck(3, 5, DIM, with_bias=True, with_last_bn=False, with_last_bias=True)
    head = SwAVHead(DIM, PROTOTYPES, crops_for_assign=crops_for_assign)
    return SwAV(Mean(), neck, head, **{"epoch_queue_starts": 0} | options).double()


def at(step: int) -> Progress:
    return Progress(step, total_steps=100, steps_per_epoch=5, seed=1)


def random_batch(size: int = 8, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    crops = [torch.randn(size, 3, px, px, dtype=torch.float64, generator=generator) for px in SIZES]
    return Batch([torch.cat(crops[:2]), torch.cat(crops[2:])], torch.arange(size), None)


def embedded(method: SwAV, batch: Batch) -> torch.Tensor:
    """(V, B, D), crop by crop but for the neck, whose BatchNorm sees all of them."""
    channels = torch.cat([crop.mean((2, 3)) for crop in batch.crops()])
    return F.normalize(method.neck(channels), dim=1).view(len(SIZES), -1, DIM)


def dots(rows, prototypes) -> list[list[float]]:
    return [[sum(a * b for a, b in zip(z, c, strict=True)) for c in prototypes] for z in rows]


def sinkhorn(scores: list[list[float]], epsilon: float, iterations: int) -> list[list[float]]:
    """The listing in the paper's appendix; q[b][k]."""
    num_rows, num_columns = len(scores), len(scores[0])
    q = [[math.exp(s / epsilon) for s in row] for row in scores]
    total = sum(sum(row) for row in q)
    q = [[value / total for value in row] for row in q]
    for _ in range(iterations):
        for k in range(num_columns):
            mass = sum(row[k] for row in q)
            for row in q:
                row[k] *= 1 / num_columns / mass
        for row in q:
            mass = sum(row)
            for k in range(num_columns):
                row[k] *= 1 / num_rows / mass
    return [[value * num_rows for value in row] for row in q]


def targets(crops, prototypes, stored=None, assigned=(0, 1)) -> dict[int, list[list[float]]]:
    """Of each assigned crop; stored: (L, A, D)."""
    found = {}
    for place, crop in enumerate(assigned):
        scores = dots(crops[crop].tolist(), prototypes.tolist())
        before = [] if stored is None else dots(stored[:, place].tolist(), prototypes.tolist())
        found[crop] = sinkhorn(before + scores, 0.05, 3)[len(before) :]
    return found


def swapped(crops, prototypes, found) -> float:
    """The loss for given targets."""
    total = 0.0
    for crop, q in found.items():
        for other in range(len(crops)):
            if other == crop:
                continue
            for scores, target in zip(dots(crops[other].tolist(), prototypes.tolist()), q, strict=True):
                log_sum = math.log(sum(math.exp(s / 0.1) for s in scores))
                total -= sum(t * (s / 0.1 - log_sum) for s, t in zip(scores, target, strict=True))
    return total / len(found) / (len(crops) - 1) / crops.shape[1]


@pytest.mark.parametrize("assigned", [(0, 1), (2,), (1, 0, 4)])
@pytest.mark.parametrize("num_stored", [0, 5])
def test_loss_and_gradient_are_the_papers(assigned, num_stored):
    """The gradient by finite differences, the targets held: they get none."""
    head = small(crops_for_assign=assigned).head
    generator = torch.Generator().manual_seed(1)
    crops = F.normalize(torch.randn(5, 6, DIM, dtype=torch.float64, generator=generator), dim=2).requires_grad_()
    stored = F.normalize(torch.randn(num_stored, len(assigned), DIM, dtype=torch.float64, generator=generator), dim=2)
    stored = stored if num_stored else None
    prototypes = head.prototypes.weight
    loss = head(crops, False, stored)
    d_crops, d_prototypes = torch.autograd.grad(loss, [crops, prototypes])

    crops, prototypes = crops.detach(), prototypes.detach()
    found = targets(crops, prototypes, stored, assigned)
    assert loss.item() == pytest.approx(swapped(crops, prototypes, found), rel=1e-12)
    for tensor, gradient in ((crops, d_crops), (prototypes, d_prototypes)):
        for place in range(0, tensor.numel(), 11):
            slope = 0.0
            for sign in (1, -1):
                tensor.view(-1)[place] += sign * 1e-6
                slope += sign * swapped(crops, prototypes, found) / 2e-6
                tensor.view(-1)[place] -= sign * 1e-6
            assert float(gradient.flatten()[place]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_crops_pass_by_groups_and_in_the_recipes_order():
    method, batch = small(), random_batch()
    loss = method(batch, at(0), None)
    assert method.backbone.seen == [(16, 3, 6, 6), (24, 3, 3, 3)]
    crops, prototypes = embedded(method, batch).detach(), method.head.prototypes.weight.detach()
    expected = swapped(crops, prototypes, targets(crops, prototypes))
    assert loss.value.item() == pytest.approx(expected, rel=1e-12)
    assert loss.carry == {}


def step_and_after(method: SwAV, batch: Batch, number: int) -> Step:
    """A step and what follows it: the queue takes its rows. No parameter moves."""
    done = step(method, [batch], at(number))
    method.after_step(at(number + 1), done.carry)
    return done


@pytest.mark.parametrize("length", [16, 20, 5])
def test_queue_joins_once_it_is_full(length):
    """Steps of 8 samples, from epoch 1 of 5 steps on; a list of pushed rows is what the queue should hold."""
    method = small(queue_length=length, epoch_queue_starts=1)
    pushed: list[torch.Tensor] = []
    used = []
    for number in range(3, 10):
        batch = random_batch(seed=number)
        crops, prototypes = embedded(method, batch).detach(), method.head.prototypes.weight.detach()
        stored = torch.stack(pushed[-length:]) if len(pushed) >= length else None
        expected = swapped(crops, prototypes, targets(crops, prototypes, stored))
        assert step_and_after(method, batch, number).loss == pytest.approx(expected, rel=1e-12), number
        used.append(stored is not None)
        if number >= 5:
            pushed += list(crops[:2].transpose(0, 1))
    assert used == [number >= 5 + math.ceil(length / 8) for number in range(3, 10)]
    held = {tuple(row) for row in method.queue.rows.tolist()}
    assert held == {tuple(row.flatten().tolist()) for row in pushed[-length:]}


def test_frozen_prototypes_get_no_gradient_and_stay():
    method, batch = small(freeze_prototypes_iters=3), random_batch()
    weight = method.head.prototypes.weight
    values = []
    for number, is_frozen in ((0, True), (2, True), (3, False)):
        method.zero_grad()
        loss = method(batch, at(number), None).value
        loss.backward()
        values.append(float(loss))
        assert (weight.grad is None) == is_frozen
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.neck.parameters())
        assert bool(method.rewrites(at(number + 1))) != is_frozen
    assert values[0] == values[1] == values[2]


def test_prototypes_are_on_the_sphere_at_first_and_after_each_step():
    method = small()
    ((parameter, normalized),) = method.rewrites(at(1))
    assert parameter is method.head.prototypes.weight
    torch.testing.assert_close(parameter.norm(dim=1), torch.ones(PROTOTYPES, dtype=torch.float64))
    moved = torch.randn(PROTOTYPES, DIM, dtype=torch.float64)
    expected = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in moved.tolist()]
    torch.testing.assert_close(normalized(moved), torch.tensor(expected, dtype=torch.float64))


def test_steps_of_the_engine_are_the_listings():
    """Six steps of SGD, of which the prototypes miss three, against the loop of the paper's appendix: prototypes are
    normalized, then come the loss, its gradient, and the update with momentum and weight decay."""
    method = small(freeze_prototypes_iters=3)
    prototypes = method.head.prototypes.weight
    prototypes.data = F.normalize(prototypes.data, dim=1)  # they were in float32
    twin = copy.deepcopy(method)
    lr, momentum, weight_decay = 0.5, 0.9, 0.01
    rule = ParamRule(match="prototypes", freeze_iters=3)
    recipe = SGD(lr=lr, momentum=momentum, weight_decay=weight_decay, paramwise=[rule])
    executor = LocalExecutor(method, recipe.create(method.named_parameters()), device=torch.device("cpu"))
    statistics = RunningStatistics(method)
    buffers = {name: torch.zeros_like(parameter) for name, parameter in twin.named_parameters()}
    for number in range(6):
        batch, progress = random_batch(seed=number), at(number)
        rates = [None if number < group["freeze_iters"] else lr for group in executor.optimizer.param_groups]
        metrics, applied = train_step(executor, method, statistics, [batch], progress, rates)
        assert applied

        weight = twin.head.prototypes.weight
        weight.data = weight.data / weight.data.square().sum(dim=1, keepdim=True).sqrt()
        crops = embedded(twin, batch)
        found = targets(crops.detach(), weight.detach())
        total = 0.0
        for crop, q in found.items():
            for other in set(range(len(crops))) - {crop}:
                scores = crops[other] @ weight.T / 0.1
                total = total - (torch.tensor(q, dtype=torch.float64) * scores.log_softmax(dim=1)).sum(dim=1).mean()
        loss = total / 2 / (len(crops) - 1)
        twin.zero_grad()
        loss.backward()
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-6)  # metrics are float32
        for name, parameter in twin.named_parameters():
            if number < 3 and "prototypes" in name:
                continue
            buffers[name] = momentum * buffers[name] + parameter.grad + weight_decay * parameter.data
            parameter.data = parameter.data - lr * buffers[name]
        for name, parameter in method.named_parameters():
            other = twin.get_parameter(name).data
            expected = F.normalize(other, dim=1) if "prototypes" in name else other
            torch.testing.assert_close(parameter.data, expected, rtol=1e-8, atol=1e-10, msg=f"{name}, step {number}")
    assert not torch.allclose(prototypes, small().head.prototypes.weight)


def test_scores_are_float32_under_autocast():
    head = SwAVHead(DIM, PROTOTYPES)
    crops = F.normalize(torch.randn(3, 6, DIM), dim=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert head.prototypes(crops).dtype == torch.float32
        under = head(crops, False)
    assert float(under) == float(head(crops, False))


def on_ranks(length: int) -> tuple[list[Step], dict[str, torch.Tensor]]:
    """Four steps, in which a queue of three of them fills up; runs in a process of its own."""
    distributed.init(torch.device("cpu"))
    own = 8 // distributed.world_size()
    method = small(queue_length=length)
    parts = [piece(random_batch(seed=number), distributed.rank() * own, own) for number in range(4)]
    return [step_and_after(method, part, number) for number, part in enumerate(parts)], method.queue.state_dict()


@pytest.mark.parametrize(("ranks", "length"), [(2, 24), (4, 21)])
def test_ranks_equal_one_process(ranks, length):
    """Sinkhorn, its queue (also one that ranks cannot share evenly) and SyncBN are those of the whole batch."""
    expected, queue = on_ranks(length)
    for steps, other_queue in run_ranks(on_ranks, ranks, length):
        for one, other in zip(steps, expected, strict=True):
            assert_close(one, other)
        torch.testing.assert_close(other_queue, queue, rtol=1e-9, atol=1e-12)


def test_targets_of_the_whole_batch_are_not_those_of_its_parts():
    """The control of the test above: the loss tells a global Sinkhorn from one for each rank."""
    batch = random_batch()
    crops, prototypes = embedded(small(), batch).detach(), small().head.prototypes.weight.detach()
    assert SwAV.compares_samples  # so `--dry-run` says where a batch is assigned in parts
    whole = swapped(crops, prototypes, targets(crops, prototypes))
    parts = [part.contiguous() for part in crops.split(4, dim=1)]
    apart = [swapped(part, prototypes, targets(part, prototypes)) for part in parts]
    assert abs(whole - sum(apart) / 2) > 1e-3


def test_bad_arguments_are_named():
    for options, message in (
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"epsilon": -1.0}, "epsilon is -1.0"),
        ({"num_prototypes": 1}, "num_prototypes is 1"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations 0"),
        ({"crops_for_assign": []}, "crops_for_assign is []"),
        ({"crops_for_assign": [1, 1]}, "crops_for_assign is [1, 1]"),
        ({"crops_for_assign": [-1]}, "crops_for_assign is [-1]"),
    ):
        with pytest.raises(ValueError) as caught:
            SwAVHead(**options)
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="feat_dim is 128, but the neck gives 4 channels"):
        SwAV(Mean(), NonLinearNeck(3, 5, 4), SwAVHead())
    with pytest.raises(ValueError, match="queue_length is -1, expected 0 or more"):
        small(queue_length=-1)
    for crops, assigned in ((1, (0,)), (5, (0, 5))):
        with pytest.raises(ValueError, match=rf"data.views give {crops} crop"):
            small(crops_for_assign=assigned).head(torch.ones(crops, 2, DIM).double(), False)


def test_the_recipe_is_the_published_one():
    config = load(str(ROOT / "configs/swav.toml"))
    assert config.name == "swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96"
    values = config.values
    model, (frozen,) = values["model"], values["optimizer"].pop("paramwise")
    assert {key: model[key] for key in ("queue_length", "epoch_queue_starts", "freeze_prototypes_iters")} == {
        "queue_length": 3840,
        "epoch_queue_starts": 15,
        "freeze_prototypes_iters": 5005,
    }
    assert frozen == {"match": r"^head\.prototypes\.", "freeze_iters": 5005}
    assert model["head"] == {
        "type": "SwAVHead",
        "feat_dim": 128,
        "num_prototypes": 3000,
        "temperature": 0.1,
        "epsilon": 0.05,
        "sinkhorn_iterations": 3,
        "crops_for_assign": [0, 1],
    }
    assert model["backbone"]["zero_init_residual"] and model["backbone"]["norm_cfg"] == {"type": "SyncBN"}
    assert values["optimizer"] == {"type": "LARS", "lr": 0.6, "momentum": 0.9, "weight_decay": 1e-6}
    assert values["lr"] == {"policy": "CosineAnnealing", "min_lr": 6e-4, "by": "iter"}
    assert (values["epochs"], values["global_batch"], values["data"]["samples_per_gpu"]) == (200, 256, 32)
    first, second = values["data"]["views"]
    assert (first["num_views"], second["num_views"]) == (2, 6)
    assert first["transforms"][0] == {"type": "RandomResizedCrop", "size": 224, "scale": [0.14, 1.0]}
    assert second["transforms"][0] == {"type": "RandomResizedCrop", "size": 96, "scale": [0.05, 0.14]}
    assert first["transforms"][1:] == second["transforms"][1:]
