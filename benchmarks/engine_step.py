"""A training step of the engine on images in memory, put together as a run puts it together, and its measurement."""

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import numpy as np
import torch
from rows import quantiles
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sslrun.config import Config
from sslrun.contract import Batch, Progress
from sslrun.data.loader import patch_masks
from sslrun.nn.norm import RunningStatistics
from sslrun.optim import learning_rates
from sslrun.plan import Machine, Plan, choose_machine, make_plan
from sslrun.recipe import Recipe
from sslrun.run_parts import make_executor
from sslrun.runtime import compilation, heartbeat
from sslrun.runtime.executor import Executor
from sslrun.runtime.numerics import set_numerics
from sslrun.session import build
from sslrun.step_metrics import StepMetrics
from sslrun.training import train_step


@dataclass
class EngineStep:
    """A recipe at its step `step`; a call does one more optimizer step on the same images."""

    recipe: Recipe
    plan: Plan
    executor: Executor
    statistics: RunningStatistics
    batches: list[Batch]
    step_metrics: StepMetrics
    step: int = 0

    def __call__(self) -> None:
        plan, recipe, executor = self.plan, self.recipe, self.executor
        heartbeat.at("before the step", self.step + 1)
        progress = Progress(self.step, plan.total_steps, plan.steps_per_epoch, recipe.seed)
        groups = executor.optimizer.param_groups
        rates = learning_rates(groups, recipe.lr, progress)
        metrics, _ = train_step(executor, recipe.model, self.statistics, self.batches, progress, rates)
        heartbeat.at("logging")
        self.step_metrics.add(metrics)
        self.step += 1


def engine_step(config: Config, device: torch.device, num_samples: int | None = None) -> EngineStep:
    """Build a recipe and everything that its steps need.

    Args:
        config: the recipe; its data need not be there.
        device: where to train.
        num_samples: how many training samples there seem to be; None for the size of the recipe's data set.
    """
    recipe = build(config)
    num_samples = num_samples or recipe.data.source.nominal_size or 100 * recipe.global_batch
    recipe.model.prepare(num_samples)
    machine = choose_machine(recipe, device, 1, 1)
    set_up(machine, device)
    plan = make_plan(recipe, num_samples, machine, 1)
    executor = make_executor(recipe, plan, device)
    return EngineStep(
        recipe=recipe,
        plan=plan,
        executor=executor,
        statistics=RunningStatistics(recipe.model),  # after the executor has moved the model to its device
        batches=[random_batch(recipe, machine, device, seed) for seed in range(plan.accumulation)],
        step_metrics=StepMetrics(),
    )


def set_up(machine: Machine, device: torch.device) -> None:
    """The settings of a process, as at the start of a run."""
    torch.set_num_threads(machine.threads)
    set_numerics(
        device, tf32=machine.tf32, cudnn_benchmark=machine.cudnn_benchmark, deterministic=machine.deterministic
    )


def random_batch(recipe: Recipe, machine: Machine, device: torch.device, seed: int = 0) -> Batch:
    """A micro-batch of random images as the loader gives them: channels-last, bfloat16 on a GPU in bf16; no labels."""
    generator, samples = torch.Generator(device).manual_seed(seed), machine.micro_batch
    dtype = torch.bfloat16 if device.type == "cuda" and machine.precision == "bf16" else torch.float32

    def images(count: int, size: tuple[int, int]) -> Tensor:
        shape = (count * samples, *size, 3)  # channels-last
        return torch.randn(shape, generator=generator, device=device).to(dtype).permute(0, 3, 1, 2)

    views = [images(group.num_views, group.size) for group in recipe.data.views]
    masks = patch_masks(recipe.data.views, seed, 0, np.arange(samples))
    return Batch(views, torch.arange(seed * samples, (seed + 1) * samples), None, masks).to(device)


def timed(step: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of `count` calls, until the device has done them."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_waits(step: Callable[[], object]) -> list[str]:
    """Where a call waits for the GPU, as torch's debug mode sees it: a line for each wait."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in seen if "called a synchronizing" in str(warning.message)]
    return [f"{Path(warning.filename).name}:{warning.lineno}" for warning in found]


def tera_operations(step: EngineStep) -> float:
    """10^12 floating-point operations of a step in eager mode, without those of our own kernels."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e12


def measure(step: EngineStep, device: torch.device, rounds: int, round_s: float) -> dict[str, Any]:
    """Figures of a step: milliseconds, images per second, and on a GPU memory and host waits.

    Args:
        step: a new one.
        device: where it runs.
        rounds: number of rounds; at least two.
        round_s: seconds of one round, at least one step.
    """
    compiled_s, graphs = compilation.compile_s(), compilation.num_graphs()
    first_s = timed(step, 1, device)  # with all that is compiled
    per_step_s = timed(step, 2, device) / 2
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    count = max(1, round(round_s / per_step_s))
    times = [timed(step, count, device) / count for _ in range(rounds)]
    ms = quantiles([1e3 * seconds for seconds in times])
    figures: dict[str, Any] = {
        "global_batch": step.plan.global_batch,
        "micro_batch": step.plan.machine.micro_batch,
        **{k: v for k, v in asdict(step.plan.machine).items() if isinstance(v, str | bool)},
        "first_step_s": round(first_s, 2),
        "compile_s": round(compilation.compile_s() - compiled_s, 2),
        "graphs": compilation.num_graphs() - graphs,
        "ms": ms,
        "images_per_s": round(1e3 * step.plan.global_batch / ms["median"], 1),
    }
    if cuda:
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
        figures["host_ms"] = round(1e3 * statistics.median(host_s(step, device) for _ in range(3)), 2)
        waits = host_waits(step)
        figures |= {"host_waits": len(waits), "waits_at": sorted(set(waits))[:5]}
    step.executor.check()
    figures["loss"] = round(step.step_metrics.read()["loss"], 4)
    return figures


def host_s(step: Callable[[], object], device: torch.device) -> float:
    """Seconds until the host has launched a call on an idle device."""
    synchronize(device)
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin
