"""DeepSpeed on two gloo ranks against the local executor: the same training, to rounding or to the bit.

Importing torch and DeepSpeed takes seconds and a ZeRO engine milliseconds, so each process checks many things.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ranks import run_ranks
from sslrun.errors import Diverged
from sslrun.optim.optimizers import GradClip
from sslrun.runtime import distributed
from toy import CPU, OPTIMIZERS, RATES, build, is_equal, largest_difference, load, state_of, train

STAGES = (0, 1, 2, 3)
SPLIT_ALL = {"stage3_param_persistence_threshold": 0}  # else stage 3 keeps parameters as small as ours whole
Case = tuple[int, str, int, float | None]  # stage, optimizer, accumulation, grad_clip

EVERY_CASE: list[Case] = [
    (stage, optimizer, accumulation, grad_clip)
    for stage in STAGES
    for optimizer in OPTIMIZERS
    for accumulation in (1, 2)
    for grad_clip in (None, 0.3)
]
# Every stage with every optimizer; accumulation and clipping on and off for each stage and each optimizer.
SOME_CASES = [case for i, case in enumerate(EVERY_CASE) if i % 4 == (i // 4) % 4]


def build_sharded(stage: int, optimizer: str, **options: Any) -> Any:
    return build(optimizer, stage, zero_options=SPLIT_ALL if stage == 3 else None, **options)


def first_life(cases: list[Case], optimizers: list[str]) -> dict[str, Any]:
    """The results of everything that one pair of processes does."""
    distributed.init(CPU)
    results = {
        "trained": several_trainings(cases),
        "saved": {optimizer: straight_then_save(optimizer) for optimizer in optimizers},
        "spoiled": spoiled_steps(),
        "odds and ends": odds_and_ends(),
        "clipped": clipped_by_other_norms(),
    }
    distributed.shutdown()
    return results


def second_life(saved: dict[str, list[tuple[dict[str, Tensor], dict[str, Tensor]]]]) -> dict[str, Any]:
    distributed.init(CPU)
    results = {optimizer: resume(optimizer, [middle for middle, _ in states]) for optimizer, states in saved.items()}
    distributed.shutdown()
    return results


@pytest.fixture(scope="module")
def lives() -> list[dict[str, Any]]:
    """The results of both ranks; DeepSpeed must print nothing."""
    return run_ranks(first_life, 2, SOME_CASES, ["adamw"], silent=True)


def several_trainings(cases: list[Case]) -> list[Any]:
    results = []
    for stage, optimizer, accumulation, grad_clip in cases:
        executor = build_sharded(stage, optimizer, accumulation=accumulation, grad_clip=grad_clip)
        results.append((train(executor, range(4), RATES[optimizer]), state_of(executor)))
    return results


def assert_parity(cases: list[Case], ranks: list[Any]) -> None:
    for case, (rows, state), (other_rows, other_state) in zip(cases, *ranks, strict=True):
        _, optimizer, accumulation, grad_clip = case
        local = build(optimizer, accumulation=accumulation, grad_clip=grad_clip)
        expected = train(local, range(4), RATES[optimizer])
        assert rows == other_rows and not other_state, case
        for row, wanted in zip(rows, expected, strict=True):
            assert row["loss"] == pytest.approx(wanted["loss"], abs=1e-6), case
            assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5), case
            assert row["applied"] is True, case
        if grad_clip is not None:
            assert max(row["grad_norm"] for row in rows) > grad_clip, case
        assert largest_difference(state, state_of(local)) < 1e-6, case


def test_same_training_as_one_process(lives: list[dict[str, Any]]) -> None:
    assert_parity(SOME_CASES, [life["trained"] for life in lives])


@pytest.mark.nightly
def test_same_training_as_one_process_in_every_case() -> None:
    lives = run_ranks(first_life, 2, EVERY_CASE, [])
    assert_parity(EVERY_CASE, [life["trained"] for life in lives])


def straight_then_save(optimizer: str) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """For each stage: the state after two steps and after four."""
    results = []
    for stage in STAGES:
        executor = build_sharded(stage, optimizer, accumulation=2)
        train(executor, range(2), RATES[optimizer])
        middle = state_of(executor)
        train(executor, range(2, 4), RATES[optimizer])
        results.append((middle, state_of(executor)))
    return results


def resume(optimizer: str, middles: list[dict[str, Tensor]]) -> list[dict[str, dict[str, Tensor]]]:
    """For each stage: what was loaded, and two steps on from its own state, from stage 0's, and without momentum."""
    results = []
    for stage in STAGES:
        ends = {}
        for name, middle in (("own", middles[stage]), ("foreign", middles[0]), ("forgetful", middles[stage])):
            executor = build_sharded(stage, optimizer, accumulation=2)
            train(executor, range(1), RATES[optimizer])  # a run in another state before it loads
            if name == "forgetful":
                executor.load_state({key: value for key, value in middle.items() if not key.startswith("optimizer.")})
            else:
                load(executor, middle)
                ends[f"{name} loaded"] = state_of(executor)
            train(executor, range(2, 4), RATES[optimizer])
            ends[name] = state_of(executor)
        results.append(ends)
    return results


def assert_continued(optimizer: str, saved: list[tuple[dict[str, Tensor], dict[str, Tensor]]], resumed: Any) -> None:
    for stage, (middle, end) in enumerate(saved):
        ends = resumed[stage]
        assert is_equal(ends["own loaded"], middle), stage
        assert is_equal(ends["own"], end), stage  # to the bit
        assert not is_equal(ends["forgetful"], end), stage  # the control
        assert is_equal(ends["foreign loaded"], saved[0][0]), stage
        assert largest_difference(ends["foreign"], saved[0][1]) < 1e-6, stage
        local = build(optimizer, accumulation=2)
        load(local, middle)
        assert is_equal(state_of(local), middle), stage
        train(local, range(2, 4), RATES[optimizer])
        assert largest_difference(state_of(local), end) < 1e-6, stage


def test_whole_state_continues_on_other_stages_and_numbers_of_ranks(lives: list[dict[str, Any]]) -> None:
    saved = lives[0]["saved"]
    resumed = run_ranks(second_life, 2, saved, silent=True)[0]
    for optimizer, states in saved.items():
        assert_continued(optimizer, states, resumed[optimizer])


@pytest.mark.nightly
def test_the_other_optimizers_continue_too() -> None:
    saved = run_ranks(first_life, 2, [], ["sgd", "lars"])[0]["saved"]
    resumed = run_ranks(second_life, 2, saved)[0]
    for optimizer, states in saved.items():
        assert_continued(optimizer, states, resumed[optimizer])


def spoiled_steps() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for stage in STAGES:
        for optimizer in ("sgd", "lars"):
            executor = build_sharded(stage, optimizer, accumulation=2, grad_clip=1.0, max_skipped_steps=1)
            train(executor, range(2), RATES[optimizer])
            states = [state_of(executor)]
            rows = []
            for step, spoil in ((2, "gradient"), (3, None), (4, "loss"), (5, None)):
                rows += train(executor, range(step, step + 1), RATES[optimizer], {step: spoil} if spoil else None)
                states.append(state_of(executor))
            results[f"{stage} {optimizer}"] = rows, states
    late = build_sharded(1, "adamw")
    late.is_late = True  # as on CUDA; the fused optimizers of the CPU obey the flag too
    train(late, range(2), RATES["adamw"])
    before = state_of(late)
    train(late, range(2, 3), RATES["adamw"], {2: "gradient"})
    after = state_of(late)
    try:
        train(late, range(3, 4), RATES["adamw"])
    except Diverged as error:
        results["late"] = before, after, str(error)
    return results


def test_one_bad_rank_stops_the_step_of_all(lives: list[dict[str, Any]]) -> None:
    ranks = [life["spoiled"] for life in lives]
    for rank, results in enumerate(ranks):
        for stage in STAGES:
            for optimizer in ("sgd", "lars"):
                rows, states = results[f"{stage} {optimizer}"]
                assert [row["applied"] for row in rows] == [False, True, False, True], (stage, optimizer)
                if rank == 0:
                    assert is_equal(states[1], states[0]) and is_equal(states[3], states[2]), (stage, optimizer)
                    local = build(optimizer, accumulation=2, grad_clip=1.0)
                    for steps in (range(2), range(3, 4), range(5, 6)):
                        train(local, steps, RATES[optimizer])
                    assert largest_difference(states[4], state_of(local)) < 1e-6, (stage, optimizer)
    before, after, message = ranks[0]["late"]
    trained = {name for name in before if not name.startswith("teacher")}
    assert is_equal({name: before[name] for name in trained}, {name: after[name] for name in trained})
    assert "not finite" in message


OTHER_CLIPS: list[dict[str, Any]] = [
    {"grad_clip": 1.0, "norm_type": 1.0},
    {"grad_clip": 0.1, "norm_type": math.inf},
    {"grad_clip": 0.2, "clip_parts": GradClip(max_norm=1.0, scope="parameter").parts},
    {"grad_clip": 0.2, "clip_parts": GradClip(max_norm=1.0, scope="module").parts},
    {"grad_clip": 0.05, "norm_type": math.inf, "clip_parts": GradClip(max_norm=1.0, scope="parameter").parts},
]


def clipped_by_other_norms() -> list[Any]:
    executors = [build_sharded(stage, "sgd", accumulation=2, **clip) for stage in STAGES for clip in OTHER_CLIPS]
    return [(train(executor, range(3), 0.2), state_of(executor)) for executor in executors]


def test_norms_other_than_the_euclidean_one_are_of_the_whole_gradient(lives: list[dict[str, Any]]) -> None:
    cases = [(stage, clip) for stage in STAGES for clip in OTHER_CLIPS]
    for (stage, clip), (rows, state) in zip(cases, lives[0]["clipped"], strict=True):
        local = build(accumulation=2, **clip)
        expected = [row["grad_norm"] for row in train(local, range(3), 0.2)]
        assert [row["grad_norm"] for row in rows] == pytest.approx(expected, rel=1e-5), (stage, clip)
        assert max(expected) > clip["grad_clip"], clip
        assert largest_difference(state, state_of(local)) < 1e-6, (stage, clip)
    assert [rows for rows, _ in lives[0]["clipped"]] == [rows for rows, _ in lives[1]["clipped"]]


def odds_and_ends() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for stage in STAGES:
        executor = build(zero_stage=stage)  # stage 3 with small parameters kept whole
        value = torch.randn(11, 24, generator=torch.Generator().manual_seed(5))
        train(executor, range(2), 0.2)
        executor.write_parameter(executor.method.student[6].weight, value)
        results[f"written {stage}"] = torch.equal(state_of(executor).get("student.6.weight", value), value)
        executor.rewrite([(executor.method.student[6].bias, lambda bias: bias - bias.mean())])
        train(executor, range(2, 4), 0.2)
        results[f"after {stage}"] = state_of(executor)
        low = build_sharded(stage, "sgd", precision="bf16")
        train(low, range(2), 0.2)
        results[f"bf16 {stage}"] = low.method.dtype_seen, state_of(low)
    buffers = build(zero_stage=1).method
    results["count"] = buffers.count.item()
    return results


def test_written_parameters_bf16_and_small_parameters(lives: list[dict[str, Any]]) -> None:
    results = lives[0]["odds and ends"]
    local, low = build(), build(precision="bf16")
    train(local, range(2), 0.2)
    value = torch.randn(11, 24, generator=torch.Generator().manual_seed(5))
    local.write_parameter(local.method.student[6].weight, value)
    local.rewrite([(local.method.student[6].bias, lambda bias: bias - bias.mean())])
    train(local, range(2, 4), 0.2)
    train(low, range(2), 0.2)
    for stage in STAGES:
        assert results[f"written {stage}"], stage
        assert largest_difference(results[f"after {stage}"], state_of(local)) < 1e-6, stage
        dtype, state = results[f"bf16 {stage}"]
        assert dtype == torch.bfloat16, stage
        assert all(value.dtype == torch.float32 for name, value in state.items() if name != "count"), stage
        assert largest_difference(state, state_of(low)) < 0.01, stage
    assert results["count"] == 3
