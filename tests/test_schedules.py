"""Schedules against values computed by hand, against mmcv's loops written out, and against torch's own schedulers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sslrun.contract import Progress
from sslrun.errors import UsageError
from sslrun.optim.policies import (
    Constant,
    CosineAnnealing,
    CosineRestart,
    Cyclic,
    Exp,
    FlatCosineAnnealing,
    Inv,
    OneCycle,
    Poly,
    Step,
)
from sslrun.optim.schedules import Schedule, learning_rates

Formula = Callable[[float, float, float], float]  # base, how far, how far in the whole run -> learning rate


def as_mmcv_runs(formula: Formula, base: float, epochs: int, per_epoch: int, by_epoch: bool, **warmup: Any) -> list:
    """The rate of every step as mmcv comes to it: a loop over epochs with one over iterations in it.

    With by_epoch the regular rate is set when an epoch begins, and warm-up goes over it at every iteration.
    """
    kind, length, ratio = warmup.get("kind"), warmup.get("length", 0), warmup.get("ratio", 0.1)
    rates, done = [], 0
    for epoch in range(epochs):
        for _ in range(per_epoch):
            rate = formula(base, epoch, epochs) if by_epoch else formula(base, done, epochs * per_epoch)
            if kind == "constant" and done < length:
                rate = rate * ratio
            if kind == "linear" and done < length:
                rate = rate - rate * (1 - ratio) * (length - done) / length
            if kind == "exp" and done < length:
                rate = rate * math.exp(math.log(ratio) * (length - done) / length)
            rates.append(rate)
            done += 1
    return rates


def half_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(part * math.pi)) / 2


def restarts(base: float, at: float, _: float) -> float:
    for begin, period, weight in ((0, 3, 1.0), (3, 5, 0.5), (8, 4, 0.25), (12, 60, 2.0)):
        if at < begin + period:
            return half_cosine(0.01 + weight * (base - 0.01), 0.01, (at - begin) / period)
    raise AssertionError


def flat_then_cosine(base: float, at: float, whole: float) -> float:
    start = round(whole * 0.65)
    return base if at < start else half_cosine(base, base * 0.1, (at - start) / (whole - start))


RESTARTS = {"periods": [3, 5, 4, 60], "restart_weights": [1.0, 0.5, 0.25, 2.0], "min_lr": 0.01}
POLICIES: dict[str, tuple[type[Schedule], dict[str, Any], Formula]] = {
    "constant": (Constant, {}, lambda base, at, whole: base),
    "step at points": (
        Step,
        {"step": [2, 5, 7], "gamma": 0.3},
        lambda base, at, whole: base * 0.3 ** ((at >= 2) + (at >= 5) + (at >= 7)),
    ),
    "step at intervals": (Step, {"step": 3, "gamma": 0.5}, lambda base, at, whole: base * 0.5 ** int(at / 3)),
    "step with a floor": (
        Step,
        {"step": [1, 2, 3], "min_lr": 0.004},
        lambda base, at, whole: max(base * 10.0 ** -min(at, 3), 0.004),
    ),
    "exp": (Exp, {"gamma": 0.9}, lambda base, at, whole: base * math.exp(at * math.log(0.9))),
    "inv": (Inv, {"gamma": 0.2, "power": 0.75}, lambda base, at, whole: base / (1 + 0.2 * at) ** 0.75),
    "poly": (
        Poly,
        {"power": 0.9, "min_lr": 0.001},
        lambda base, at, whole: (base - 0.001) * ((whole - at) / whole) ** 0.9 + 0.001,
    ),
    "line": (Poly, {"min_lr_ratio": 0.5}, lambda base, at, whole: base * (1 - 0.5 * at / whole)),
    "cosine": (CosineAnnealing, {"min_lr": 0.02}, lambda base, at, whole: half_cosine(base, 0.02, at / whole)),
    "cosine to a part": (
        CosineAnnealing,
        {"min_lr_ratio": 0.01},
        lambda base, at, whole: half_cosine(base, base / 100, at / whole),
    ),
    "restarts": (CosineRestart, RESTARTS, restarts),
    "flat cosine": (FlatCosineAnnealing, {"start_percent": 0.65, "min_lr_ratio": 0.1}, flat_then_cosine),
}
WARMUPS: dict[str, dict[str, Any]] = {
    "none": {},
    "constant": {"kind": "constant", "length": 7, "ratio": 0.2},
    "linear": {"kind": "linear", "length": 12, "ratio": 0.001},
    "exp": {"kind": "exp", "length": 9, "ratio": 0.05},
}


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("by", ["epoch", "iter"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_step_is_mmcvs(policy, by, warmup):
    cls, options, formula = POLICIES[policy]
    epochs, per_epoch, given = 9, 5, WARMUPS[warmup]
    if given:
        options = {**options, "warmup": given["kind"], "warmup_iters": given["length"], "warmup_ratio": given["ratio"]}
    schedule = cls(by=by, **options)
    for base in (0.03, 4.8):
        expected = as_mmcv_runs(formula, base, epochs, per_epoch, by == "epoch", **given)
        seen = [schedule.value(base, step, per_epoch, epochs * per_epoch) for step in range(epochs * per_epoch)]
        assert seen == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) > 1 or policy == "constant"


def torchs(scheduler: Callable[[torch.optim.Optimizer], Any], base: float, steps: int) -> list[float]:
    """The rates that one of torch's schedulers sets."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
    plan, rates = scheduler(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        plan.step()
    return rates


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize(("steps", "pct_start"), [(50, 0.3), (47, 0.25), (1000, 0.02), (30, 0.0)])
def test_one_cycle_is_torchs(strategy, three_phase, steps, pct_start):
    if three_phase and pct_start == 0:
        pct_start = 0.1
    options = {"pct_start": pct_start, "div_factor": 10.0, "final_div_factor": 100.0, "three_phase": three_phase}
    scheduler = torch.optim.lr_scheduler.OneCycleLR
    expected = torchs(
        lambda optimizer: scheduler(
            optimizer, max_lr=0.4, total_steps=steps + 1, anneal_strategy=strategy, cycle_momentum=False, **options
        ),
        0.4,
        steps,
    )
    schedule = OneCycle(anneal_strategy=strategy, total_steps=steps + 1, **options)
    assert [schedule.value(0.4, step, 7, steps) for step in range(steps)] == pytest.approx(expected, rel=1e-9)
    own_length, stated = OneCycle(**options), OneCycle(total_steps=steps, **options)  # of the run, and as it says
    assert all(own_length.value(0.4, s, 7, steps) == stated.value(0.4, s, 7, steps) for s in range(steps))
    assert own_length.value(0.4, steps - 1, 7, steps) == pytest.approx(0.0004, rel=1e-9)


def test_one_cycle_whose_rise_is_one_step_begins_at_the_peak():
    assert OneCycle(pct_start=0.1).value(0.4, 0, 5, 10) == pytest.approx(0.4)


def test_torch_agrees_on_restarts_powers_and_factors():
    cases = [
        (
            CosineRestart(by="iter", periods=[10, 10, 10], min_lr=0.1),
            lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, eta_min=0.1),
        ),
        (
            Poly(by="iter", power=2.0),
            lambda optimizer: torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=30, power=2.0),
        ),
        (Exp(by="iter", gamma=0.8), lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)),
        (
            Step(by="iter", step=7, gamma=0.5),
            lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.5),
        ),
    ]
    for schedule, scheduler in cases:
        seen = [schedule.value(0.6, step, 4, 30) for step in range(30)]
        assert seen == pytest.approx(torchs(scheduler, 0.6, 30), rel=1e-9), schedule


def test_a_policy_after_the_warmup_begins_where_that_ends():
    """MAE's and MoCo v3's code: lr t / W in the warm-up, then half a cosine over the rest of the run."""
    schedule = CosineAnnealing(by="iter", warmup="linear", warmup_epochs=3, warmup_ratio=1e-9, after_warmup=True)
    per_epoch, total, warmup = 10, 80, 30
    for step in range(total):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        expected = 2.0 * step / warmup if step < warmup else 2.0 * cosine
        assert schedule.value(2.0, step, per_epoch, total) == pytest.approx(expected, abs=1e-8), step
    held = CosineAnnealing(by="epoch", warmup="linear", warmup_epochs=3, after_warmup=True)
    values = [held.value(2.0, step, per_epoch, total) for step in range(total)]
    assert values[30:40] == [2.0] * 10
    assert values[40:50] == pytest.approx([1 + math.cos(math.pi / 5)] * 10)


def test_a_run_longer_than_its_policy_is_refused():
    three, cycle = CosineRestart(periods=[2, 1]), OneCycle(total_steps=30)
    three.check(10, 30), cycle.check(10, 30), CosineAnnealing().check(10, 10**9)
    with pytest.raises(
        UsageError, match=r"lr: CosineRestart ends after 30 steps \(3 epochs\).*last for 40 \(4 epochs\)"
    ):
        three.check(10, 40)
    with pytest.raises(UsageError, match="lr: OneCycle ends after 30 steps"):
        cycle.check(10, 31)
    CosineRestart(periods=[2, 1], warmup="linear", warmup_epochs=1, after_warmup=True).check(10, 40)


def test_cosine_of_a_run_that_ends_within_an_epoch():
    assert CosineAnnealing().value(1.0, 14, 10, 15) == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 10 / 15))


def test_warmup_in_epochs_multiplies_the_running_policy():
    """mmcv: rate = regular * (1 - (1 - t / T) * (1 - ratio)), the regular one of by = epoch being this epoch's."""
    schedule = CosineAnnealing(warmup="linear", warmup_epochs=2, warmup_ratio=0.01)
    for step in range(30):
        regular = 0.5 * (1 + math.cos(math.pi * (step // 5) / 6))
        expected = regular * (1 - (1 - step / 10) * 0.99) if step < 10 else regular
        assert schedule.value(1.0, step, 5, 30) == pytest.approx(expected)


def test_step_in_fractions_of_the_run():
    expected = [0.06] * 20 + [0.06 * 0.4] * 10 + [0.06 * 0.16] * 10
    schedule = Step(step=[0.5, 0.75], gamma=0.4)
    assert [schedule.value(0.06, step, 10, 40) for step in range(40)] == pytest.approx(expected)
    # half of 3 epochs is step 15; the rate is held within epoch 1 and drops with epoch 2
    assert [Step(step=[0.5]).value(1.0, step, 10, 30) for step in (15, 19, 20)] == pytest.approx([1.0, 1.0, 0.1])


def test_cyclic_is_mmcvs():
    total, times, ratio = 47, 2, 0.4

    def mmcv(base: float, step: int) -> float:
        cycle = total // times
        up = int(ratio * cycle)
        for start, end, first, last in [(0, up, 1, 10), (up, cycle, 10, 1e-4)]:
            at = step % cycle
            if start <= at < end:
                cosine = math.cos(math.pi * (at - start) / (end - start)) + 1
                return base * last + 0.5 * (base * first - base * last) * cosine
        raise AssertionError

    schedule = Cyclic(target_ratio=(10, 1e-4), cyclic_times=times, step_ratio_up=ratio)
    assert [schedule.value(0.1, s, 5, total) for s in range(total)] == pytest.approx(
        [mmcv(0.1, s) for s in range(total)], rel=1e-12
    )
    assert max(schedule.value(0.1, s, 5, total) for s in range(total)) == pytest.approx(1.0)


@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_a_cycles_peak_comes_nearer_by_gamma(strategy):
    """Two cycles of 10 steps, 4 of them up: from 1 to the peak, and from there to the end."""
    schedule = Cyclic(target_ratio=5.0, cyclic_times=2, anneal_strategy=strategy, gamma=0.5)
    between = half_cosine if strategy == "cos" else lambda start, end, part: start + (end - start) * part
    for step in range(20):
        peak = 5.0 if step < 10 else 3.0  # half as far from 1
        within = step % 10
        rising, falling = between(1, peak, within / 4), between(peak, 5e-5, (within - 4) / 6)
        assert schedule.value(0.2, step, 3, 20) == pytest.approx(0.2 * (rising if within < 4 else falling), rel=1e-12)


def test_cyclic_without_a_rising_part_starts_at_the_peak():
    assert Cyclic(step_ratio_up=0.0).value(0.1, 0, 5, 10) == pytest.approx(1.0)


def test_the_update_after_the_last_step_may_ask():
    schedules = [Constant(), CosineAnnealing(), Step(step=[0.5]), Cyclic(), OneCycle(), CosineRestart(periods=[4])]
    schedules += [Exp(gamma=0.5), Inv(gamma=0.1), Poly(power=0.5), FlatCosineAnnealing()]
    for schedule in schedules:
        assert math.isfinite(schedule.value(1.0, 40, 10, 40))
        assert math.isfinite(schedule.value(1.0, 0, 10, 1)) and math.isfinite(schedule.value(1.0, 1, 10, 1))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Constant(warmup="linear"), "warmup_iters or warmup_epochs"),
        (lambda: Constant(warmup="linear", warmup_iters=5, warmup_epochs=1), "either"),
        (lambda: Constant(warmup_iters=5), "do nothing without warmup"),
        (lambda: Constant(warmup="linear", warmup_iters=5, warmup_ratio=0.0), "warmup_ratio"),
        (lambda: Constant(warmup="linear", warmup_iters=-5), "negative"),
        (lambda: Constant(after_warmup=True), "do nothing without warmup"),
        (lambda: Step(step=[]), "step must list"),
        (lambda: Step(step=0), "step must be at least 1"),
        (lambda: Step(step=1, gamma=-0.1), "gamma cannot be -0.1"),
        (lambda: Exp(gamma=float("nan")), "gamma cannot be nan"),
        (lambda: Inv(gamma=-1.0), "gamma cannot be -1.0"),
        (lambda: Poly(power=0.0), "power must be above 0"),
        (lambda: CosineAnnealing(min_lr=-1.0), "min_lr cannot be -1.0"),
        (lambda: CosineAnnealing(min_lr=0.1, min_lr_ratio=0.1), "min_lr and min_lr_ratio"),
        (lambda: FlatCosineAnnealing(start_percent=75), "start_percent is a fraction of the run"),
        (lambda: CosineRestart(periods=[]), "periods must list"),
        (lambda: CosineRestart(periods=[3, 0]), "periods must list"),
        (lambda: CosineRestart(periods=[3, 4], restart_weights=[1.0]), "2 entries and restart_weights 1"),
        (lambda: Cyclic(gamma=0.0), "gamma must be above 0"),
        (lambda: OneCycle(pct_start=30), "pct_start is a fraction"),
        (lambda: OneCycle(div_factor=0.0), "div_factor is 0.0"),
        (lambda: Step(step=[0]), "step must list"),
        (lambda: Cyclic(cyclic_times=0), "cyclic_times"),
        (lambda: Cyclic(step_ratio_up=1.0), "step_ratio_up"),
    ],
)
def test_impossible_arguments(make, word):
    with pytest.raises(UsageError, match=word):
        make()


def test_policies_are_found_by_name():
    policies = {"Constant", "Step", "Exp", "Inv", "Poly", "CosineAnnealing", "CosineRestart", "FlatCosineAnnealing"}
    assert policies | {"Cyclic", "OneCycle"} <= Schedule.registry.keys() and "Annealing" not in Schedule.registry
    assert Schedule.tag == "policy"


def test_groups_have_their_own_rate_and_fixed_ones_keep_theirs():
    groups = [
        {"initial_lr": rate, "fix_lr": fixed, "freeze_iters": 0}
        for rate, fixed in [(1.0, False), (0.1, False), (0.5, True)]
    ]
    assert learning_rates(groups, CosineAnnealing(by="iter"), Progress(5, 10, 10, 0)) == pytest.approx([0.5, 0.05, 0.5])


def test_a_frozen_group_has_no_rate_until_its_time():
    groups = [{"initial_lr": 1.0, "fix_lr": True, "freeze_iters": 3}]
    rates = [learning_rates(groups, CosineAnnealing(), Progress(step, 10, 10, 0)) for step in (0, 2, 3)]
    assert rates == [[None], [None], [1.0]]
    groups = [{"initial_lr": 1.0, "fix_lr": True, "freeze_epochs": 0.5}]
    rates = [learning_rates(groups, CosineAnnealing(), Progress(step, 10, 10, 0)) for step in (0, 4, 5)]
    assert rates == [[None], [None], [1.0]], "half an epoch of 10 steps"


@pytest.mark.parametrize("length", [{"ramp_iters": 4}, {"ramp_epochs": 0.4}])
def test_after_its_freeze_a_group_rises_to_what_the_schedule_gives(length):
    groups = [{"initial_lr": 2.0, "fix_lr": fixed, "freeze_iters": 2, **length} for fixed in (True, False)]
    policy = CosineAnnealing(by="iter")
    rates = [learning_rates(groups, policy, Progress(step, 10, 10, 0)) for step in range(10)]
    assert [fixed for fixed, _ in rates] == [None, None, 0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    wanted = [policy.value(2.0, step, 10, 10) * min((step - 2) / 4, 1) for step in range(2, 10)]
    assert [scheduled for _, scheduled in rates[2:]] == pytest.approx(wanted)
