"""On CUDA: the guard on the device, without a host read, and the same training as on the CPU."""

import os

import pytest
import torch

from sslrun.errors import Diverged
from sslrun.randomness import Phase
from toy import (
    CPU,
    OPTIMIZERS,
    RATES,
    build,
    is_equal,
    largest_difference,
    micro_batches,
    progress_at,
    rates_at,
    state_of,
    train,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_trains_as_on_the_cpu_and_the_device_guards_the_weights(optimizer: str) -> None:
    executor, reference = (build(optimizer, device=device, grad_clip=1.0) for device in (CUDA, CPU))
    rows = train(executor, range(3), RATES[optimizer])
    train(reference, range(3), RATES[optimizer])
    assert rows[0]["applied"] is None
    executor.check()
    assert largest_difference(state_of(executor), state_of(reference)) < 1e-4
    before = state_of(executor)
    train(executor, range(3, 4), RATES[optimizer], {3: "gradient"})
    after = state_of(executor)
    trained = {name for name in before if not name.startswith("teacher")}
    assert is_equal({name: before[name] for name in trained}, {name: after[name] for name in trained})
    with pytest.raises(Diverged):
        executor.check()


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_step_waits_for_nothing(optimizer: str) -> None:
    executor = build(optimizer, device=CUDA, grad_clip=1.0)
    train(executor, range(2), RATES[optimizer])
    batches = [batch.to(CUDA) for batch in micro_batches(2, 1)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        (target,) = executor.targets(batches, progress_at(2))
        executor.backward(executor.forward(batches[0], progress_at(2), target).value)
        executor.step(rates_at(2, RATES[optimizer]))
        executor.update_teachers([(executor.method.teacher, executor.method.student, 0.9)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    executor.check()


def test_draws_on_the_device_go_by_step_and_micro_batch() -> None:
    executor = build(device=CUDA)

    def draws(step: int) -> list[float]:
        drawn = []
        for phase in Phase:
            executor.seed(progress_at(step), phase)
            drawn += [torch.rand((), device=CUDA).item(), torch.rand(()).item()]
        return drawn

    first = draws(0)
    torch.rand(7, device=CUDA)
    assert draws(0) == first and len({*first, *draws(1)}) == 2 * len(first)


@pytest.mark.needs("deepspeed")
def test_zero_stages_of_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "0")
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for optimizer in OPTIMIZERS:
            reference = build(optimizer, device=CUDA, grad_clip=1.0)
            train(reference, range(3), RATES[optimizer])
            for stage in range(4):
                executor = build(optimizer, stage, device=CUDA, grad_clip=1.0)
                train(executor, range(3), RATES[optimizer])
                executor.check()
                assert largest_difference(state_of(executor), state_of(reference)) < 1e-4, (optimizer, stage)
    finally:
        torch.distributed.destroy_process_group()
