"""DenseCL against its paper written longhand. (Cuts of the batch: test_cuts.py.)"""

import math
from pathlib import Path

import pytest
import torch
from steps import PROGRESS, assert_close, longhand_step, step
from two_views import random_batch

from sslrun.config import load
from sslrun.contract import Batch
from sslrun.methods.densecl import DenseCL, Keys, matched
from sslrun.nn.heads import ContrastiveHead
from sslrun.nn.necks import DenseCLNeck
from sslrun.nn.resnet import ResNet

CONFIGS = Path(__file__).parents[2] / "configs"
TEMPERATURE, LAMBDA = 0.3, 0.25


def small(**options: float) -> DenseCL:
    """Feature maps of 2 x 2 cells for images of 16 pixels."""
    torch.manual_seed(0)
    backbone, neck = ResNet(18, stem="small", base_width=4), DenseCLNeck(32, 12, 6)
    settings = {"queue_len": 7, "feat_dim": 6, "loss_lambda": LAMBDA, **options}
    return DenseCL(backbone, neck, ContrastiveHead(TEMPERATURE), **settings).double()


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / sum(vector * vector).sqrt()


def nce(query: torch.Tensor, positive: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """Eq. 1 of arXiv 2011.09157 for one vector."""
    own = torch.exp(sum(unit(query) * positive) / TEMPERATURE)
    return -torch.log(own / (own + sum(torch.exp(sum(unit(query) * n) / TEMPERATURE) for n in negatives)))


def projected(neck: DenseCLNeck, vector: torch.Tensor, branch: str) -> torch.Tensor:
    """One vector through the two layers of a branch; its 1 x 1 convolutions are linear layers."""
    first, second = getattr(neck, branch)[0], getattr(neck, branch)[2]
    hidden = (first.weight.flatten(1) @ vector + first.bias).clamp(min=0)
    return second.weight.flatten(1) @ hidden + second.bias


def longhand(method: DenseCL, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss (eq. 4), and the rows that enter the two queues; one BatchNorm group, so that no shuffle shows."""
    queries, keys = method.backbone(batch.crops()[0])[-1], method.key_backbone(batch.crops()[1])[-1].detach()
    cells = [(i, j) for i in range(queries.shape[2]) for j in range(queries.shape[3])]
    assert len(cells) == 4
    total, global_keys, dense_keys = torch.zeros((), dtype=torch.float64), [], []
    with torch.no_grad():
        for key in keys:
            mean = sum(key[:, i, j] for i, j in cells) / len(cells)
            global_keys.append(unit(projected(method.key_neck, mean, "mlp")))
            dense = [projected(method.key_neck, key[:, i, j], "mlp2") for i, j in cells]
            dense_keys.append(unit(sum(dense) / len(cells)))
    for n in range(len(queries)):
        mean = sum(queries[n, :, i, j] for i, j in cells) / len(cells)
        global_loss = nce(projected(method.neck, mean, "mlp"), global_keys[n], method.queue.rows)
        dense_loss = torch.zeros((), dtype=torch.float64)
        for i, j in cells:
            similarity = [float(sum(unit(queries[n, :, i, j]) * unit(keys[n, :, a, b])).detach()) for a, b in cells]
            a, b = cells[similarity.index(max(similarity))]  # eq. 3
            positive = unit(projected(method.key_neck, keys[n, :, a, b], "mlp2")).detach()
            query = projected(method.neck, queries[n, :, i, j], "mlp2")
            dense_loss = dense_loss + nce(query, positive, method.dense_queue.rows) / len(cells)  # eq. 2
        total = total + ((1 - LAMBDA) * global_loss + LAMBDA * dense_loss) / len(queries)
    return total, torch.stack(global_keys), torch.stack(dense_keys)


def test_a_step_is_the_papers() -> None:
    method, twin, batch = small(), small(), random_batch(5, 16)
    expected, global_keys, dense_keys = longhand(twin, batch)
    done = step(method, [batch])
    assert_close(done, longhand_step(expected, twin), rtol=1e-5, atol=1e-6)  # keys are float32
    method.after_step(PROGRESS, done.carry)
    for queue, rows in ((method.queue, global_keys), (method.dense_queue, dense_keys)):
        torch.testing.assert_close(queue.rows[:5], rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(method.queue.rows[5:], twin.queue.rows[5:], rtol=0, atol=0)


def test_cells_are_matched_by_direction_not_length() -> None:
    """Each cell of the query finds the key cell that points its way, however long either is."""
    directions = torch.eye(4)
    order = [2, 0, 3, 1]
    features = (directions * torch.tensor([0.1, 30.0, 2.0, 0.5])).view(1, 4, 2, 2)
    keys = directions[:, order] + 0.2
    cells = (keys / keys.norm(dim=0)).unsqueeze(0)
    dense = torch.arange(4.0).view(1, 1, 4).expand(1, 3, 4)
    found = matched(features, Keys(torch.empty(0), dense, torch.empty(0), cells))
    assert found.shape == (1, 3, 4)
    assert found[0, 0].tolist() == [order.index(cell) for cell in range(4)]


def test_the_dense_loss_may_start_later() -> None:
    """Up to that step the loss is MoCo's, and the dense branch learns nothing."""
    batch = random_batch(4, 16)
    (target,) = small().targets([batch], PROGRESS)
    for start, weight in ((0, LAMBDA), (3, LAMBDA), (4, 0.0)):  # PROGRESS is at step 3
        method = small(loss_lambda_start_iters=start)
        loss = method(batch, PROGRESS, target)
        expected = (1 - weight) * loss.metrics["global_loss"] + weight * loss.metrics["dense_loss"]
        assert loss.value.item() == pytest.approx(expected.item())
        loss.value.backward()
        assert (method.neck.mlp2[0].weight.grad.abs().sum() > 0) == (weight > 0)


def test_chance_is_what_equal_embeddings_get() -> None:
    method = small()
    rows = torch.ones(3, 6, dtype=torch.float64)
    loss, _ = method.head(rows, rows / math.sqrt(6), (rows[:1] / math.sqrt(6)).expand(7, -1))
    assert loss.item() == pytest.approx(method.chance_loss())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="feat_dim is 9, but the neck gives 6"):
        small(feat_dim=9)
    with pytest.raises(ValueError, match=r"loss_lambda is 1\.5, expected 0 to 1"):
        small(loss_lambda=1.5)
    with pytest.raises(ValueError, match="momentum is -1, expected 0 to 1"):
        small(momentum=-1)
    with pytest.raises(ValueError, match="loss_lambda_start_iters is -1, expected 0 or more"):
        small(loss_lambda_start_iters=-1)


def test_the_recipe_is_the_published_one() -> None:
    config, mocov2 = load(CONFIGS / "densecl.toml"), load(CONFIGS / "mocov2.toml")
    assert config.name == "densecl_resnet50_8xb32-coslr-200e_in1k"
    model = config.values["model"]
    assert (model["queue_len"], model["feat_dim"], model["momentum"]) == (65536, 128, 0.999)
    assert (model["loss_lambda"], model["loss_lambda_start_iters"], model["head"]["temperature"]) == (0.5, 0, 0.2)
    assert model["neck"] == {"type": "DenseCLNeck", "in_channels": 2048, "hid_channels": 2048, "out_channels": 128}
    without = {key: value for key, value in config.values.items() if key != "model"}
    assert without == {key: value for key, value in mocov2.values.items() if key != "model"}
