"""NPID against its paper written longhand. (Cuts of the batch: test_cuts.py.)"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from steps import PROGRESS, step

from sslrun.config import load
from sslrun.contract import Backbone, Batch, Progress
from sslrun.methods.npid import NPID
from sslrun.nn.drawn_rows import uniform_indices
from sslrun.nn.heads import ContrastiveHead
from sslrun.nn.necks import LinearNeck
from sslrun.nn.queue_and_bank import Bank, last_occurrence

ROOT = Path(__file__).parents[2]
SAMPLES, PIXELS, DIM = 50, 4, 6


class Mean(Backbone, listed=False):
    """A backbone without parameters: the image's channels as they are."""

    num_features = 3

    def forward(self, images):
        return [images]


def small(seed: int = 0, samples: int = SAMPLES, **options) -> NPID:
    torch.manual_seed(seed)
    options = {"neg_num": 20, "feat_dim": DIM} | options
    method = NPID(Mean(), LinearNeck(3, DIM), ContrastiveHead(temperature=0.3), **options)
    method.prepare(samples)
    return method.double()


def random_batch() -> Batch:
    size, generator = 8, torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, PIXELS, PIXELS, dtype=torch.float64, generator=generator)
    index = torch.randint(SAMPLES, (size,), generator=generator)
    index[5] = index[2]  # the later one counts
    return Batch([images], index, None)


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def split_mix(key: int, count: int) -> list[int]:
    """SplitMix64 as it is published, in Python's integers."""
    full, state, numbers = 2**64 - 1, key, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & full
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & full
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & full
        numbers.append(z ^ (z >> 31))
    return numbers


def drawn(batch: Batch, bound: int, count: int) -> list[list[int]]:
    """The negatives of each sample of a whole global batch."""
    keys = torch.randint(2**63 - 1, (len(batch.index),), generator=PROGRESS.generator()).tolist()
    return [[number % 2**63 % bound for number in split_mix(key, count)] for key in keys]


@pytest.mark.parametrize("ensure_neg", [False, True])
def test_loss_gradient_and_bank_are_the_papers(ensure_neg):
    """With loops; the gradient by finite differences of them."""
    method, batch = small(ensure_neg=ensure_neg), random_batch()
    bank = method.bank.rows.clone()
    negatives = drawn(batch, SAMPLES - ensure_neg, 20)
    if ensure_neg:  # a draw from the others is their rank among them
        others = [[j for j in range(SAMPLES) if j != own] for own in batch.index.tolist()]
        negatives = [[others[i][j] for j in row] for i, row in enumerate(negatives)]

    def embeddings(weight, bias):
        channels = batch.views[0].mean((2, 3)).tolist()
        return [
            unit([b + sum(w * x for w, x in zip(row, image, strict=True)) for row, b in zip(weight, bias, strict=True)])
            for image in channels
        ]

    def loss(weight, bias):
        total = 0.0
        for i, z in enumerate(embeddings(weight, bias)):
            similar = [sum(a * b for a, b in zip(z, bank[j].tolist(), strict=True)) for j in negatives[i]]
            own = sum(a * b for a, b in zip(z, bank[batch.index[i]].tolist(), strict=True))
            total -= math.log(math.exp(own / 0.3) / sum(math.exp(s / 0.3) for s in [own, *similar]))
        return total / len(batch.index)

    weight, bias = method.neck.fc.weight.tolist(), method.neck.fc.bias.tolist()
    done = step(method, [batch])
    assert done.loss == pytest.approx(loss(weight, bias), rel=1e-12)
    for row, column in ((0, 0), (3, 2), (5, 1)):
        slope = 0.0
        for sign in (1, -1):
            moved = [list(line) for line in weight]
            moved[row][column] += sign * 1e-6
            slope += sign * loss(moved, bias) / 2e-6
        assert float(done.gradients["neck.fc.weight"][row, column]) == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert done.gradients["neck.fc.bias"].abs().sum() > 0

    method.after_step(PROGRESS, done.carry)
    after = method.bank.rows
    latest = dict(zip(batch.index.tolist(), embeddings(weight, bias), strict=True))  # a later entry replaces an earlier
    for i, z in latest.items():
        mixed = unit([0.5 * old + 0.5 * new for old, new in zip(bank[i].tolist(), z, strict=True)])
        torch.testing.assert_close(after[i], torch.tensor(mixed, dtype=torch.float64))
    untouched = [i for i in range(SAMPLES) if i not in latest]
    assert torch.equal(after[untouched], bank[untouched])


def test_draws_are_split_mix():
    keys = torch.tensor([1234567, 0, 2**63 - 1, -5])
    expected = [[number % 2**63 for number in split_mix(int(key) % 2**64, 5)] for key in keys]
    assert split_mix(1234567, 2) == [6457827717110365317, 3203168211198807973]  # as others print them
    assert uniform_indices(keys, 5, 2**63 - 1).tolist() == expected
    assert uniform_indices(keys, 5, 1000).tolist() == [[number % 1000 for number in row] for row in expected]


@pytest.mark.parametrize("bound", [2, 7, 64])
def test_draws_are_uniform_and_independent(bound):
    """Chi-square of single draws, of neighbors in a row and of the same place in neighboring rows: 5 sigma."""
    keys = torch.randint(2**63 - 1, (50,), generator=torch.Generator().manual_seed(0))
    index = uniform_indices(keys, 4000, bound)
    pairs = index[:, ::2] * bound + index[:, 1::2], index[::2] * bound + index[1::2]
    for draws, cells in ((index, bound), *((pair, bound**2) for pair in pairs)):
        expected = draws.numel() / cells
        chi_square = ((draws.flatten().bincount(minlength=cells) - expected) ** 2 / expected).sum()
        assert abs(float(chi_square) - (cells - 1)) < 5 * math.sqrt(2 * (cells - 1))


def test_the_own_row_is_left_out_and_the_others_stay_equally_likely():
    own = torch.tensor([0, 3, 6])
    index = uniform_indices(torch.tensor([1, 2, 3]), 70000, 7, own)
    for row, left_out in zip(index, own.tolist(), strict=True):
        counts = row.bincount(minlength=7)
        assert counts[left_out] == 0
        others = torch.cat([counts[:left_out], counts[left_out + 1 :]])
        assert (others - 70000 / 6).abs().max() < 5 * math.sqrt(70000 / 6)
    assert (uniform_indices(torch.tensor([1, 2, 3]), 70000, 7) == own.unsqueeze(1)).any()


def test_draws_change_with_the_step_and_the_seed():
    method, batch = small(), random_batch()
    (keys,) = method.targets([batch], PROGRESS)
    assert torch.equal(keys, method.targets([batch], PROGRESS)[0]) and len(set(keys.tolist())) == 8
    for other in (Progress(4, 10, 5, 1), Progress(3, 10, 5, 2)):
        assert not (keys == method.targets([batch], other)[0]).any()


def test_last_occurrence():
    index = torch.tensor([7, 1, 7, 3, 1, 7])
    assert last_occurrence(index).tolist() == [5, 4, 5, 3, 4, 5]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_bank_takes_the_highest_position_of_a_sample(momentum):
    torch.manual_seed(0)
    bank = Bank(9, 4, momentum)
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(9))
    before, new = bank.rows.clone(), F.normalize(torch.randn(5, 4), dim=1)
    bank.update(torch.tensor([2, 8, 2, 0, 2]), new)
    for i in range(9):
        expected = before[i]
        for position, sample in enumerate([2, 8, 2, 0, 2]):
            if sample == i:  # each begins with the old row, so that the last one alone counts
                expected = F.normalize((1 - momentum) * before[i] + momentum * new[position], dim=0)
        torch.testing.assert_close(bank.rows[i], expected)


def test_the_bank_depends_on_the_seed_alone():
    first, again, other = small(4), small(4), small(5)
    assert torch.equal(first.bank.rows, again.bank.rows)
    assert not torch.allclose(first.bank.rows, other.bank.rows)
    torch.manual_seed(4)
    late = NPID(Mean(), LinearNeck(3, DIM), ContrastiveHead(), neg_num=20, feat_dim=DIM)
    torch.randn(100)  # what comes between building and preparing does not matter
    late.prepare(SAMPLES)
    assert torch.equal(late.bank.rows.double(), first.bank.rows)
    assert "bank.rows" in first.state_dict()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="feat_dim is 9, but the neck gives 6"):
        small(feat_dim=9)
    with pytest.raises(ValueError, match="neg_num is 0"):
        small(neg_num=0)
    with pytest.raises(ValueError, match=r"momentum is 1\.5"):
        small(momentum=1.5)
    with pytest.raises(ValueError, match="a bank of 0 x 6 rows is empty"):
        small(samples=0)
    with pytest.raises(ValueError, match="momentum is -1"):
        Bank(3, 2, -1)


def test_the_recipes_are_the_published_ones():
    config = load(str(ROOT / "configs/npid.toml"))
    assert config.name == "npid_resnet50_8xb32-steplr-200e_in1k"
    values = config.values
    model, views = values["model"], values["data"]["views"]
    assert (model["neg_num"], model["feat_dim"], model["momentum"], model["ensure_neg"]) == (65536, 128, 0.5, False)
    assert model["head"] == {"type": "ContrastiveHead", "temperature": 0.07}
    assert model["backbone"]["norm_cfg"] == {"type": "SyncBN"}
    assert values["optimizer"] == {"type": "SGD", "lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4}
    assert values["lr"] == {"policy": "Step", "step": [120, 160], "gamma": 0.1, "by": "epoch"}
    assert (values["epochs"], values["global_batch"], values["data"]["samples_per_gpu"]) == (200, 256, 32)
    assert [view["num_views"] for view in views] == [1]
    assert [transform["type"] for transform in views[0]["transforms"]] == [
        "RandomResizedCrop",
        "RandomGrayscale",
        "ColorJitter",
        "RandomHorizontalFlip",
        "Normalize",
    ]
    sibling = load(str(ROOT / "configs/selfsup/npid/npid-ensure-neg_resnet50_8xb32-steplr-200e_in1k.toml")).values
    assert sibling == values | {"model": model | {"ensure_neg": True}}
