"""A network small enough to train in milliseconds, with what a method has: student, teacher, buffers, odd shapes."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sslrun.contract import Batch, Loss, Method, Progress
from sslrun.optim.lars import LARS
from sslrun.runtime import distributed
from sslrun.runtime.executor import Executor, LocalExecutor

CPU = torch.device("cpu")
GLOBAL_BATCH = 8
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.2, momentum=0.9, weight_decay=1e-3, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.05, fused=True),
    "lars": lambda groups: LARS(groups, lr=20.0, momentum=0.9, weight_decay=1e-3),
}
RATES = {"sgd": 0.2, "adamw": 0.01, "lars": 20.0}


class ToyMethod(Method):
    """Regression of a teacher's output plus one. The head's second layer is used in even steps only."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.student = nn.Sequential(
                nn.Conv2d(3, 6, 3, padding=1), nn.GELU(), nn.Conv2d(6, 6, 1), nn.GELU(), nn.AdaptiveAvgPool2d(2),
                nn.Flatten(), nn.Linear(24, 11), nn.Tanh(), nn.Linear(11, 5),
            )  # fmt: skip
            self.sometimes = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.ones(5))  # of no submodule
        self.shift = nn.Parameter(torch.zeros(1))  # too small for each of two ranks to hold a part of it
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.full((5,), 0.5))
        self.register_buffer("count", torch.tensor(3))
        self.spoil: str | None = None
        self.dtype_seen: torch.dtype | None = None

    def targets(self, batches: list[Batch], progress: Progress) -> list[Tensor]:
        return [self.teacher(batch.views[0]) + self.center for batch in batches]

    def forward(self, batch: Batch, progress: Progress, targets: Tensor) -> Loss:
        output = self.student(batch.views[0])
        self.dtype_seen = output.dtype
        output = output * self.scale + self.shift
        if progress.step % 2 == 0:
            output = output + self.sometimes(output)
        value = (output.float() - targets.float() - 1).square().mean()
        if self.spoil == "gradient":
            value = value * float("nan")
        if self.spoil == "loss":
            value = value + torch.full_like(value, float("inf"))
        return Loss(value, {"value": value.detach()}, {"rows": targets.detach()})


def build(
    optimizer: str = "sgd", zero_stage: int | None = None, device: torch.device = CPU, **options: Any
) -> Executor:
    """An executor over a new ToyMethod: a LocalExecutor, or with `zero_stage` a DeepSpeedExecutor."""
    method = ToyMethod()
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1]},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    if optimizer == "lars":
        groups[1]["lars_exclude"] = True
    torch_optimizer = OPTIMIZERS[optimizer](groups)
    if zero_stage is None:
        return LocalExecutor(method, torch_optimizer, device=device, **options)
    from sslrun.runtime.deepspeed_executor import DeepSpeedExecutor

    return DeepSpeedExecutor(method, torch_optimizer, device=device, zero_stage=zero_stage, **options)


def progress_at(step: int) -> Progress:
    return Progress(step, total_steps=100, steps_per_epoch=10, seed=0)


def micro_batches(step: int, accumulation: int) -> list[Batch]:
    """This rank's micro-batches of the global batch of a step."""
    pixels = torch.randn(GLOBAL_BATCH, 3, 6, 6, generator=torch.Generator().manual_seed(step))
    mine = pixels.chunk(distributed.world_size())[distributed.rank()]
    return [Batch([part], torch.arange(len(part)), None) for part in mine.chunk(accumulation)]


def rates_at(step: int, rate: float) -> list[float]:
    """Learning rates of the two groups; a rate for LARS is too large for parameters that LARS does not scale."""
    return [rate * (1 + step / 10), min(rate, 0.2)]


def train(executor: Executor, steps: range, rate: float, spoil: dict[int, str] | None = None) -> list[dict[str, Any]]:
    """Train as the training loop does; returns loss (mean over ranks), gradient norm and outcome of each step.

    `spoil` names the steps whose loss ("loss") or gradient ("gradient") is to be non-finite, in the last micro-batch of
    the last rank alone.
    """
    method, rows = executor.method, []
    for step in steps:
        progress = progress_at(step)
        batches = [batch.to(executor.device) for batch in micro_batches(step, executor.accumulation)]
        values = []
        for i, (batch, target) in enumerate(zip(batches, executor.targets(batches, progress), strict=True)):
            is_last = i == len(batches) - 1 and distributed.rank() == distributed.world_size() - 1
            method.spoil = (spoil or {}).get(step) if is_last else None
            loss = executor.forward(batch, progress, target)
            executor.backward(loss.value)
            values.append(loss.value.detach())
        mean = torch.stack(values).mean()
        distributed.all_reduce_mean_([mean])
        outcome = executor.step(rates_at(step, rate))
        if outcome.applied is not False:
            executor.update_teachers([(method.teacher, method.student, 0.9)])
        rows.append({"loss": mean.item(), "grad_norm": outcome.grad_norm.item(), "applied": outcome.applied})
    return rows


def state_of(executor: Executor) -> dict[str, Tensor]:
    """Model and optimizer state in one dictionary (rank 0)."""
    return executor.full_state() | {f"optimizer.{name}": value for name, value in executor.optimizer_state().items()}


def load(executor: Executor, state: dict[str, Tensor]) -> None:
    """Load what `state_of` returned."""
    executor.load_state({name: value for name, value in state.items() if not name.startswith("optimizer.")})
    executor.load_optimizer_state(
        {name.removeprefix("optimizer."): value for name, value in state.items() if name.startswith("optimizer.")}
    )


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference over all entries; infinite if the names differ."""
    if one.keys() != other.keys():
        return float("inf")
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def is_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether both have the same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
