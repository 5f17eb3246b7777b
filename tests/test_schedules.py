"""Schedules against values computed by hand, and against mmcv's loops written out."""

import math

import pytest

from sslrun.errors import UsageError
from sslrun.optim.schedules import Constant, CosineAnnealing, Cyclic, Schedule, Step, learning_rates


def test_cosine_by_epoch_is_held_within_an_epoch_and_known_at_quarters():
    schedule = CosineAnnealing(min_lr=0.0)
    values = [schedule.value(0.03, step, 10, 40) for step in range(40)]
    quarter = 0.03 * (1 + math.sqrt(0.5)) / 2
    assert values[0:10] == [0.03] * 10
    assert values[10:20] == pytest.approx([quarter] * 10)
    assert values[20:30] == pytest.approx([0.015] * 10)
    assert values[30:40] == pytest.approx([0.03 - quarter] * 10)


def test_cosine_by_iter_with_floor():
    schedule = CosineAnnealing(min_lr=0.2, by="iter")
    assert [schedule.value(1.0, step, 7, 4) for step in range(5)] == pytest.approx(
        [1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2]
    )


def test_cosine_of_a_run_that_ends_within_an_epoch():
    assert CosineAnnealing().value(1.0, 14, 10, 15) == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 10 / 15))


@pytest.mark.parametrize("by", ["epoch", "iter"])
def test_linear_warmup_goes_by_iteration(by):
    schedule = Constant(by=by, warmup="linear", warmup_iters=4, warmup_ratio=0.2)
    assert [schedule.value(10.0, step, 3, 100) for step in range(6)] == pytest.approx([2.0, 4.0, 6.0, 8.0, 10.0, 10.0])


def test_warmup_in_epochs_multiplies_the_running_policy():
    """mmcv: rate = regular * (1 - (1 - t / T) * (1 - ratio)), the regular one of by = epoch being this epoch's."""
    schedule = CosineAnnealing(warmup="linear", warmup_epochs=2, warmup_ratio=0.01)
    for step in range(30):
        regular = 0.5 * (1 + math.cos(math.pi * (step // 5) / 6))
        expected = regular * (1 - (1 - step / 10) * 0.99) if step < 10 else regular
        assert schedule.value(1.0, step, 5, 30) == pytest.approx(expected)


def test_step_in_epochs_and_fractions():
    in_epochs = Step(step=[2, 3], gamma=0.4)
    in_fractions = Step(step=[0.5, 0.75], gamma=0.4)
    expected = [0.06] * 20 + [0.06 * 0.4] * 10 + [0.06 * 0.16] * 10
    assert [in_epochs.value(0.06, step, 10, 40) for step in range(40)] == pytest.approx(expected)
    assert [in_fractions.value(0.06, step, 10, 40) for step in range(40)] == pytest.approx(expected)


def test_step_in_iterations_and_a_fraction_within_an_epoch():
    assert [Step(step=[3], by="iter").value(1.0, step, 10, 40) for step in (2, 3)] == pytest.approx([1.0, 0.1])
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


def test_cyclic_without_a_rising_part_starts_at_the_peak():
    assert Cyclic(step_ratio_up=0.0).value(0.1, 0, 5, 10) == pytest.approx(1.0)


def test_the_update_after_the_last_step_may_ask():
    for schedule in (Constant(), CosineAnnealing(), Step(step=[0.5]), Cyclic()):
        assert math.isfinite(schedule.value(1.0, 40, 10, 40))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Constant(warmup="linear"), "warmup_iters or warmup_epochs"),
        (lambda: Constant(warmup="linear", warmup_iters=5, warmup_epochs=1), "either"),
        (lambda: Constant(warmup_iters=5), "do nothing without warmup"),
        (lambda: Constant(warmup="linear", warmup_iters=5, warmup_ratio=0.0), "warmup_ratio"),
        (lambda: Constant(warmup="linear", warmup_iters=-5), "negative"),
        (lambda: Step(step=[]), "step must list"),
        (lambda: Step(step=[0]), "step must list"),
        (lambda: Cyclic(cyclic_times=0), "cyclic_times"),
        (lambda: Cyclic(step_ratio_up=1.0), "step_ratio_up"),
    ],
)
def test_impossible_arguments(make, word):
    with pytest.raises(UsageError, match=word):
        make()


def test_policies_are_found_by_name():
    assert {"Constant", "CosineAnnealing", "Step", "Cyclic"} <= Schedule.registry.keys()
    assert Schedule.tag == "policy"


def test_groups_have_their_own_rate_and_fixed_ones_keep_theirs():
    groups = [
        {"initial_lr": rate, "fix_lr": fixed, "freeze_iters": 0}
        for rate, fixed in [(1.0, False), (0.1, False), (0.5, True)]
    ]
    assert learning_rates(groups, CosineAnnealing(by="iter"), 5, 10, 10) == pytest.approx([0.5, 0.05, 0.5])


def test_a_frozen_group_has_no_rate_until_its_time():
    groups = [{"initial_lr": 1.0, "fix_lr": True, "freeze_iters": 3}]
    assert [learning_rates(groups, CosineAnnealing(), step, 10, 10) for step in (0, 2, 3)] == [[None], [None], [1.0]]
