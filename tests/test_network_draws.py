"""What networks draw is that of the global batch: any division into micro-batches gives the same."""

import math

import pytest
import torch

from sslrun.contract import Batch, Progress
from sslrun.methods.dino import DINO, DINOHead
from sslrun.nn.necks import DINONeck
from sslrun.nn.norm import set_groups
from sslrun.nn.stochastic import RotaryPositions, StochasticDepth, with_branch
from sslrun.nn.vit import VisionTransformer
from sslrun.randomness import Phase
from sslrun.runtime.executor import LocalExecutor
from sslrun.runtime.network_draws import begin

GROUP, SAMPLES, VIEWS, PASSES = 4, 16, 2, 2
RATES = [0.3, 0.5, 0.0]
Place = tuple[int, int, int, int]  # pass, branch, view, sample of the global batch


def counting(num_groups: int, seed: int = 0, step: int = 0) -> set[Place]:
    """Where branches count in a step that is cut into micro-batches of some groups."""
    depth, samples = StochasticDepth(RATES), GROUP * num_groups
    set_groups(depth, GROUP, num_groups)
    found = set()
    for micro_batch in range(SAMPLES // samples):
        begin([depth], seed, step, Phase.FORWARD, micro_batch)
        for number in range(PASSES):
            for branch, kept in enumerate(depth(VIEWS * samples)):
                if kept is not None:
                    rows = kept.rows if kept.counts is None else kept.rows[kept.counts]
                    assert len(set(kept.rows.tolist())) == len(kept.rows)
                    for row in rows.tolist():
                        found.add((number, branch, row // samples, micro_batch * samples + row % samples))
    return found


def test_stochastic_depth_keeps_the_same_samples_for_every_cut():
    whole = counting(4)
    assert whole == counting(2) == counting(1)
    assert whole != counting(4, seed=1) and whole != counting(4, step=1)
    parts = [{place[2:] for place in whole if place[:2] == (number, 1)} for number in range(PASSES)]
    assert parts[0] != parts[1], "each pass has a draw of its own"
    assert {sample for view, sample in parts[0] if view == 0} != {sample for view, sample in parts[0] if view == 1}
    sizes = {branch: set() for branch in range(3)}
    for number in range(PASSES):
        for branch in range(3):
            for view in range(VIEWS):
                for group in range(SAMPLES // GROUP):
                    places = [(number, branch, view, sample) for sample in range(GROUP * group, GROUP * group + GROUP)]
                    sizes[branch].add(len(whole.intersection(places)))
    assert sizes == {0: {2, 3}, 1: {2}, 2: {0}}, "of 4: 2.8 on average, 2, and all without a draw"


def test_the_share_of_the_samples_is_the_rates():
    """Also of a rate whose share of a group is no whole number; no place in a group is preferred."""
    depth = StochasticDepth([0.1])
    set_groups(depth, 8, 4096)
    (kept,) = depth(8 * 4096)
    x = torch.ones(8 * 4096, 1, dtype=torch.float64)
    seen = with_branch(x, lambda rows: 2 * rows, kept).view(4096, 8)
    assert seen.unique().tolist() == pytest.approx([1, 1 + 2 / 0.9])
    assert seen.mean().item() == pytest.approx(3, abs=0.01)
    share = (seen > 1).double().mean(dim=0)
    assert share.sub(0.9).abs().max() < 0.025, "five standard deviations"


def test_rows_that_are_no_views_of_the_samples_are_one_group():
    depth = StochasticDepth([0.5])
    set_groups(depth, 4, 2)
    (kept,) = depth(6)
    assert len(kept.rows) == 3 and set(kept.rows.tolist()) <= set(range(6))


def test_rotary_positions_are_rescaled_alike_in_the_whole_global_batch():
    rotary = RotaryPositions(8, blocks=64, rescale=1.5).double()

    def waves(step: int, micro_batch: int) -> list[torch.Tensor]:
        begin([rotary], 0, step, Phase.FORWARD, micro_batch)
        return [rotary(8, 8) for _ in range(2)]

    first, second = waves(0, 0)
    assert torch.equal(first, waves(0, 3)[0]) and torch.equal(second, waves(0, 3)[1])
    assert not torch.equal(first, second) and not torch.equal(first, waves(1, 0)[0])
    # The angle of row 4 of 8, whose center is at 1/8, at the period 1: 2 pi / 8 times the factor.
    factors = first[0, :, 4 * 8, 0].asin() * 8 / (2 * torch.pi)
    assert len(factors.unique()) == 64 and factors.min() >= 1 / 1.5 and factors.max() <= 1.5
    logs = factors.log() / math.log(1.5)
    assert logs.mean().abs() < 0.3 and logs.min() < -0.8 and logs.max() > 0.8, "uniform in the logarithm"


def test_a_step_of_dino_is_the_same_for_every_cut():
    torch.manual_seed(0)
    crops = [torch.randn(8, 3, size, size) for size in (16, 16, 8, 8)]
    network = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, positions="rotary", rotary_rescale=2.0,
        drop_path=0.6,
    )  # fmt: skip
    method = DINO(network, DINONeck(16, 16, 6), DINOHead(6, 12))
    progress = Progress(step=3, total_steps=10, steps_per_epoch=5, seed=7)

    def gradients(micro_batch: int, step: int = 3) -> list[torch.Tensor]:
        optimizer = torch.optim.SGD(method.backbone.parameters(), 0.1)
        count = 8 // micro_batch
        executor = LocalExecutor(method, optimizer, device=torch.device("cpu"), precision="fp64", accumulation=count)
        set_groups(method, 2, micro_batch // 2)
        parts = zip(*(views.split(micro_batch) for views in crops), strict=True)
        batches = [Batch(list(views), torch.arange(micro_batch), None) for views in parts]
        place = Progress(step, progress.total_steps, progress.steps_per_epoch, progress.seed)
        targets = executor.targets(batches, place)
        for batch, target in zip(batches, targets, strict=True):
            executor.backward(executor.forward(batch, place, target).value)
        found = [p.grad.clone() for p in method.backbone.parameters() if p.grad is not None]
        optimizer.zero_grad()
        return found

    whole = gradients(8)
    for micro_batch in (4, 2):
        torch.testing.assert_close(gradients(micro_batch), whole, rtol=1e-10, atol=1e-14)
    assert not any(torch.equal(a, b) for a, b in zip(whole, gradients(8, step=4), strict=True)), "another step"
