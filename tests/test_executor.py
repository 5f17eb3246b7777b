"""The local executor against plain torch; the finite check; state saved and loaded. (DeepSpeed: test_deepspeed.py.)"""

import copy
import math

import pytest
import torch
from torch import nn

import toy
from sslrun.errors import Diverged, UsageError
from sslrun.optim.lars import LARS
from sslrun.optim.optimizers import GradClip
from sslrun.randomness import Phase
from sslrun.runtime import compilation, distributed
from sslrun.runtime.executor import LocalExecutor
from toy import (
    CPU,
    OPTIMIZERS,
    RATES,
    ToyMethod,
    build,
    is_equal,
    largest_difference,
    load,
    micro_batches,
    progress_at,
    rates_at,
    state_of,
    train,
)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize(("grad_clip", "norm_type"), [(None, 2.0), (0.3, 2.0), (1.0, 1.0), (0.4, 3.5), (0.1, math.inf)])
def test_equals_a_plain_loop_over_the_whole_batch(optimizer: str, grad_clip: float | None, norm_type: float) -> None:
    executor = build(optimizer, accumulation=4, grad_clip=grad_clip, norm_type=norm_type)
    rows = train(executor, range(4), RATES[optimizer])

    method = ToyMethod()
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    plain = OPTIMIZERS[optimizer](
        [
            {"params": [p for p in trained if p.dim() > 1]},
            {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0, "lars_exclude": optimizer == "lars"},
        ]
    )
    for step in range(4):
        for group, rate in zip(plain.param_groups, rates_at(step, RATES[optimizer]), strict=True):
            group["lr"] = rate
        (batch,) = micro_batches(step, 1)
        with torch.no_grad():
            (target,) = method.targets([batch], progress_at(step))
        loss = method(batch, progress_at(step), target).value + 0 * sum(p.sum() for p in method.sometimes.parameters())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, math.inf if grad_clip is None else grad_clip, norm_type)
        plain.step()
        plain.zero_grad()
        with torch.no_grad():
            for teacher, student in zip(method.teacher.parameters(), method.student.parameters(), strict=True):
                teacher.copy_(0.9 * teacher + 0.1 * student)
        assert rows[step]["loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert rows[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert rows[step]["applied"] is True
    if grad_clip is not None:
        assert max(row["grad_norm"] for row in rows) > grad_clip  # it did clip
    assert largest_difference(executor.full_state(), method.state_dict()) < 1e-6


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("scope", ["global", "module", "parameter"])
def test_each_part_of_the_gradient_is_clipped_by_its_own_norm(scope: str, norm_type: float) -> None:
    limit = {2.0: 0.1, 1.0: 0.5, math.inf: 0.03}[norm_type]
    parts = GradClip(max_norm=1.0, scope=scope).parts
    executor = build(precision="fp64", grad_clip=limit, norm_type=norm_type, clip_parts=parts)
    (batch,) = micro_batches(1, 1)
    (target,) = executor.targets([batch], progress_at(1))
    executor.backward(executor.forward(batch, progress_at(1), target).value)
    trained = {name: p for name, p in executor.method.named_parameters() if p.requires_grad}
    gradients = {name: 0 * p.detach() if p.grad is None else p.grad.clone() for name, p in trained.items()}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    outcome = executor.step([1.0, 1.0], [0.0, 0.0])

    def norm_of(names: list[str]) -> float:
        numbers = [abs(x) for name in names for x in gradients[name].flatten().tolist()]
        return max(numbers) if norm_type == math.inf else sum(x**norm_type for x in numbers) ** (1 / norm_type)

    top = sorted({name.split(".")[0] for name in trained})
    together = {
        "global": [list(trained)],
        "module": [[name for name in trained if name.split(".")[0] == part] for part in top],
        "parameter": [[name] for name in trained],
    }[scope]
    factors = [min(1.0, limit / (norm_of(names) + 1e-6)) for names in together]
    assert min(factors) < 0.9 and (scope == "global" or max(factors) == 1.0), "some are clipped and some are not"
    for names, factor in zip(together, factors, strict=True):
        for name in names:
            moved = before[name] - trained[name].detach()
            torch.testing.assert_close(moved, factor * gradients[name], rtol=1e-12, atol=1e-14)
    assert outcome.grad_norm.item() == pytest.approx(norm_of(list(trained)), rel=1e-12)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("spoil", ["gradient", "loss"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_step_that_is_not_finite_leaves_no_trace(optimizer: str, spoil: str, norm_type: float) -> None:
    executor = build(optimizer, accumulation=2, grad_clip=1.0, norm_type=norm_type, max_skipped_steps=1)
    train(executor, range(2), RATES[optimizer])
    before = state_of(executor)
    rows = train(executor, range(2, 3), RATES[optimizer], {2: spoil})
    assert rows[0]["applied"] is False
    assert is_equal(state_of(executor), before)
    assert train(executor, range(3, 4), RATES[optimizer])[0]["applied"] is True
    reference = build(optimizer, accumulation=2, grad_clip=1.0, norm_type=norm_type)
    train(reference, range(2), RATES[optimizer])
    train(reference, range(3, 4), RATES[optimizer])
    assert is_equal(state_of(executor), state_of(reference))


def test_more_skipped_steps_in_a_row_than_allowed_end_the_run() -> None:
    with pytest.raises(Diverged, match="not finite"):
        train(build(), range(2), 0.1, {1: "gradient"})
    executor = build(max_skipped_steps=2)
    train(executor, range(6), 0.1, {0: "loss", 1: "loss", 3: "loss", 4: "gradient"})  # two, and two
    before = state_of(executor)
    with pytest.raises(Diverged, match="3 steps in a row"):
        train(executor, range(6, 9), 0.1, dict.fromkeys(range(6, 9), "loss"))
    assert is_equal(state_of(executor), before)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_flag_read_one_step_late(optimizer: str) -> None:
    """As on CUDA, where fused optimizers obey a flag on the device; those of the CPU do too."""
    executor = build(optimizer, grad_clip=1.0)
    executor.is_late = True
    assert train(executor, range(2), RATES[optimizer])[1]["applied"] is None
    executor.check()
    reference = build(optimizer, grad_clip=1.0)
    train(reference, range(2), RATES[optimizer])
    assert is_equal(state_of(executor), state_of(reference))
    names = [name for name, parameter in executor.method.named_parameters() if parameter.requires_grad]
    state, optimizer_state = executor.full_state(), executor.optimizer_state()
    train(executor, range(2, 3), RATES[optimizer], {2: "gradient"})
    assert is_equal({name: executor.full_state()[name] for name in names}, {name: state[name] for name in names})
    assert is_equal(executor.optimizer_state(), optimizer_state)
    with pytest.raises(Diverged):
        train(executor, range(3, 4), RATES[optimizer])
    executor.check()  # raised once


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_state_continues_bit_for_bit(optimizer: str) -> None:
    straight = build(optimizer, accumulation=2)
    train(straight, range(2), RATES[optimizer])
    saved = copy.deepcopy(state_of(straight))
    train(straight, range(2, 4), RATES[optimizer])
    resumed = build(optimizer, accumulation=2)
    load(resumed, saved)
    assert is_equal(state_of(resumed), saved)
    train(resumed, range(2, 4), RATES[optimizer])
    assert is_equal(state_of(resumed), state_of(straight))

    forgetful = build(optimizer, accumulation=2)  # the control: without the optimizer's state it is another run
    forgetful.load_state({name: value for name, value in saved.items() if not name.startswith("optimizer.")})
    train(forgetful, range(2, 4), RATES[optimizer])
    assert not is_equal(forgetful.full_state(), straight.full_state())


def test_state_is_plain_cpu_tensors_of_its_own() -> None:
    executor = build("adamw")
    train(executor, range(1), 0.01)
    state = state_of(executor)
    assert {"student.0.weight", "teacher.0.weight", "center", "count"} <= state.keys()
    assert {f"optimizer.student.0.weight/{key}" for key in ("exp_avg", "exp_avg_sq", "step")} <= state.keys()
    assert not any(name.startswith("optimizer.teacher") for name in state)
    assert all(type(value) is torch.Tensor and value.is_contiguous() for value in state.values())
    assert not any(value.requires_grad for value in state.values())
    kept = copy.deepcopy(state)
    train(executor, range(1, 2), 0.01)
    assert is_equal(state, kept)


def test_load_says_what_does_not_match() -> None:
    executor = build()
    state = executor.full_state()
    other = {name: value + 1 for name, value in state.items()}
    del other["student.0.weight"]
    other["student.0.bias"] = torch.zeros(7)
    other["extra"] = torch.zeros(1)
    with pytest.raises(UsageError, match=r"1 missing \(student.0.weight\).*1 unexpected \(extra\).*student.0.bias"):
        executor.load_state(other)
    assert is_equal(executor.full_state(), state)
    mismatch = executor.load_state(other, strict=False)
    assert (mismatch.missing, mismatch.unexpected) == (["student.0.weight"], ["extra"])
    assert mismatch.reshaped == ["student.0.bias"]
    loaded = executor.full_state()
    assert torch.equal(loaded["center"], other["center"]) and torch.equal(loaded["count"], other["count"])
    assert torch.equal(loaded["student.0.bias"], state["student.0.bias"])
    with pytest.raises(UsageError, match="stranger"):
        executor.load_optimizer_state({"stranger/exp_avg": torch.zeros(1)})


def test_a_state_of_another_dtype_is_refused_unless_it_may_be_converted() -> None:
    executor = build()
    before = executor.full_state()
    other = before | {"student.0.bias": torch.full((6,), 0.1, dtype=torch.float16)}
    with pytest.raises(UsageError, match=r"the state does not fit the model: 1 of another dtype \(student.0.bias\)"):
        executor.load_state(other)
    assert is_equal(executor.full_state(), before)
    assert executor.load_state(other, converts=True).recast == ["student.0.bias"]
    assert torch.equal(executor.full_state()["student.0.bias"], other["student.0.bias"].float())


def test_optimizer_state_of_another_dtype_than_its_parameter_keeps_it() -> None:
    executor = build()
    state = {"student.0.bias/moments": torch.arange(6, dtype=torch.int8)}
    executor.load_optimizer_state(state)
    assert is_equal(executor.optimizer_state(), state)


def test_teachers_follow_in_float32() -> None:
    executor = build(precision="bf16")
    teacher, student = executor.method.teacher, executor.method.student
    start = [parameter.detach().clone() for parameter in teacher.parameters()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 1.0
    executor.update_teachers([(teacher, student, 0.99999)])
    for before, after, followed in zip(start, teacher.parameters(), student.parameters(), strict=True):
        expected = 0.99999 * before.double() + 0.00001 * followed.double()
        torch.testing.assert_close(after.double(), expected, rtol=0, atol=1e-7)
        assert not torch.equal(after, before)
    executor.update_teachers([(teacher, student, 0.0)])
    assert all(torch.equal(t, s) for t, s in zip(teacher.parameters(), student.parameters(), strict=True))


def test_bf16_computes_low_and_keeps_float32() -> None:
    executor = build(precision="bf16")
    train(executor, range(2), 0.2)
    assert executor.method.dtype_seen == torch.bfloat16
    assert all(value.dtype == torch.float32 for name, value in state_of(executor).items() if name != "count")
    reference = build()
    train(reference, range(2), 0.2)
    assert 0 < largest_difference(executor.full_state(), reference.full_state()) < 0.02


def test_write_parameter_and_wrong_groups() -> None:
    executor = build()
    weight = executor.method.student[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    value = torch.randn(weight.shape)
    executor.write_parameter(weight, value)
    assert torch.equal(executor.full_state()["student.0.weight"], value)
    method = ToyMethod()
    with pytest.raises(AssertionError, match=r"teacher.* gets no gradient"):
        LocalExecutor(method, LARS(method.parameters(), lr=1.0), device=CPU)


def test_rewrite_sees_the_whole_value() -> None:
    executor = build()
    before = executor.full_state()["scale"]
    executor.rewrite([(executor.method.scale, lambda scale: 2 * scale + 1)])
    assert torch.equal(executor.full_state()["scale"], 2 * before + 1)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_group_without_rate_stays_as_it_is_and_gathers_no_momentum(optimizer: str) -> None:
    executor, rates = build(optimizer), [RATES[optimizer], None]
    frozen = [executor.names[p] for p in executor.optimizer.param_groups[1]["params"]]
    before = executor.full_state()
    for name, parameter in executor.method.named_parameters():
        parameter.requires_grad_(name not in frozen and parameter.requires_grad)  # the method detaches it
    for rate in (rates, rates):
        (batch,) = micro_batches(0, 1)
        (target,) = executor.targets([batch], progress_at(0))
        executor.backward(executor.forward(batch, progress_at(0), target).value)
        executor.step(rate)
    after, state = executor.full_state(), executor.optimizer_state()
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["student.0.weight"], after["student.0.weight"])
    assert not any(
        state[f"{name}/{key}"].any()
        for name in frozen
        for key in ("momentum_buffer", "exp_avg")
        if f"{name}/{key}" in state
    )
    assert executor.optimizer.param_groups[0]["weight_decay"] > 0


def test_accumulation_is_kept_to() -> None:
    executor = build(accumulation=2)
    (batch,) = micro_batches(0, 1)
    (target,) = executor.targets([batch], progress_at(0))
    executor.backward(executor.forward(batch, progress_at(0), target).value)
    with pytest.raises(AssertionError, match="1 micro-batches, not 2"):
        executor.step([0.1, 0.1])


class Written(nn.Sequential):
    """torch.compile leaves modules alone whose forward is torch's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x)
        return x


class WrittenMethod(ToyMethod):
    def __init__(self) -> None:
        super().__init__()
        self.student.__class__ = self.teacher.__class__ = Written


@pytest.mark.nightly
@pytest.mark.parametrize("cuda_graphs", [False, True])  # of which Inductor makes none on the CPU
def test_compiled_submodules_train_alike(cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "ToyMethod", WrittenMethod)
    executor, reference = build(compile=True, cuda_graphs=cuda_graphs), build()
    before = compilation.num_graphs()
    train(executor, range(3), 0.2)
    assert compilation.num_graphs() >= before + 2, "of student and teacher"
    train(reference, range(3), 0.2)
    assert executor.full_state().keys() == reference.full_state().keys()
    assert largest_difference(executor.full_state(), reference.full_state()) < 1e-5


def test_draws_from_torchs_generators_go_by_step_rank_and_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = build(accumulation=2)
    drawn: list[float] = []
    monkeypatch.setattr(executor.method, "targets", lambda batches, _: drawn.append(torch.rand(()).item()) or [0, 0])
    monkeypatch.setattr(executor.method, "forward", lambda *_: drawn.append(torch.rand(()).item()))

    batches = micro_batches(0, 2)

    def draws(step: int, rank: int = 0) -> list[float]:
        """Numbers drawn in the targets, in two micro-batches, in the update and before an epoch."""
        progress = progress_at(step)
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        drawn.clear()
        for batch, target in zip(batches, executor.targets(batches, progress), strict=True):
            executor.forward(batch, progress, target)
        for phase in (Phase.UPDATE, Phase.EPOCH):
            executor.seed(progress, phase)
            drawn.append(torch.rand(()).item())
        return list(drawn)

    first = draws(0)
    torch.rand(7)  # somebody else draws in between
    assert draws(0) == first
    assert len({*first, *draws(1), *draws(0, rank=1)}) == 5 + 5 + 3, "equal numbers for different purposes"
    assert draws(0, rank=1)[3:] == first[3:], "the update of a state that all ranks have in common"
