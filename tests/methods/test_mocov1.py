"""MoCo v1, which is MoCo with a linear projector and a recipe of its own: against the paper written longhand."""

import math
from pathlib import Path

import pytest
import torch
from steps import PROGRESS
from two_views import random_batch

from sslrun.config import load
from sslrun.methods.moco import MoCo
from sslrun.nn.heads import ContrastiveHead
from sslrun.nn.necks import LinearNeck
from sslrun.nn.resnet import ResNet
from sslrun.optim import Schedule
from sslrun.runtime.executor import LocalExecutor

CONFIGS = Path(__file__).parents[2] / "configs"
TEMPERATURE, QUEUE_LEN, MOMENTUM = 0.07, 7, 0.9


def small_mocov1() -> MoCo:
    torch.manual_seed(0)
    backbone = ResNet(18, stem="small", base_width=4)
    head = ContrastiveHead(TEMPERATURE)
    return MoCo(backbone, LinearNeck(32, 6), head, QUEUE_LEN, feat_dim=6, momentum=MOMENTUM).double()


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / math.sqrt(sum(float(x) ** 2 for x in vector))


def embedded(backbone: torch.nn.Module, weight: torch.Tensor, bias: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Average over positions, one linear layer, as sums."""
    maps = backbone(images)[-1]
    pooled = sum(maps[:, :, i, j] for i in range(maps.shape[2]) for j in range(maps.shape[3])) / maps[0, 0].numel()
    return torch.stack([sum(weight[:, c] * row[c] for c in range(len(row))) + bias for row in pooled])


def test_a_step_is_the_papers() -> None:
    """Algorithm 1 of arXiv 1911.05722: loss, its gradient, the momentum encoder and the queue, for one step of SGD."""
    method, twin, batch = small_mocov1(), small_mocov1(), random_batch(4)
    queue = method.queue.rows.clone()

    first, second = batch.crops()
    keys = embedded(twin.key_backbone, twin.key_neck.fc.weight, twin.key_neck.fc.bias, second)
    keys = torch.stack([unit(key) for key in keys]).detach()
    total = torch.zeros((), dtype=torch.float64)
    for query, key in zip(embedded(twin.backbone, twin.neck.fc.weight, twin.neck.fc.bias, first), keys, strict=True):
        query = query / query.square().sum().sqrt()
        own = torch.exp((query * key).sum() / TEMPERATURE)
        others = sum(torch.exp((query * negative).sum() / TEMPERATURE) for negative in queue)
        total = total - torch.log(own / (own + others))
    (total / 4).backward()
    with torch.no_grad():
        for student, teacher in zip(twin.backbone.parameters(), twin.key_backbone.parameters(), strict=True):
            student -= 0.1 * student.grad
            teacher.copy_(MOMENTUM * teacher + (1 - MOMENTUM) * student)

    executor = LocalExecutor(
        method,
        torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1),
        device=torch.device("cpu"),
    )
    (targets,) = executor.targets([batch], PROGRESS)
    loss = executor.forward(batch, PROGRESS, targets)
    executor.backward(loss.value)
    assert loss.value.item() == pytest.approx(total.item() / 4, rel=1e-5)  # keys are float32
    torch.testing.assert_close(method.neck.fc.weight.grad, twin.neck.fc.weight.grad, rtol=1e-4, atol=1e-6)
    executor.step([0.1])
    executor.update_teachers(method.teachers(PROGRESS))
    method.after_step(PROGRESS, loss.carry)
    for mine, longhand in zip(method.key_backbone.parameters(), twin.key_backbone.parameters(), strict=True):
        torch.testing.assert_close(mine, longhand, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.queue.rows, torch.cat([keys, queue[4:]]), rtol=1e-5, atol=1e-6)


def test_the_recipe_is_the_published_one() -> None:
    config = load(CONFIGS / "mocov1.toml")
    assert config.name == "mocov1_resnet50_8xb32-steplr-200e_in1k"
    values = config.values
    assert values["model"]["neck"] == {"type": "LinearNeck", "in_channels": 2048, "out_channels": 128}
    assert values["model"]["head"] == {"type": "ContrastiveHead", "temperature": 0.07}
    assert (values["model"]["queue_len"], values["model"]["momentum"]) == (65536, 0.999)
    (group,) = values["data"]["views"]
    kinds = [transform["type"] for transform in group["transforms"]]
    assert kinds == ["RandomResizedCrop", "RandomGrayscale", "ColorJitter", "RandomHorizontalFlip", "Normalize"]
    jitter = {"type": "ColorJitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.4}
    assert group["num_views"] == 2 and group["transforms"][2] == jitter
    assert values["optimizer"] == {"type": "SGD", "lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4}
    assert values["epochs"] == 200 and values["global_batch"] == 256 and values["data"]["samples_per_gpu"] == 32


def test_the_learning_rate_falls_twice() -> None:
    schedule = load(CONFIGS / "mocov1.toml").build(Schedule, "lr")
    rates = [schedule.value(0.03, epoch * 5004, 5004, 200 * 5004) for epoch in (0, 119, 120, 159, 160, 199)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])
