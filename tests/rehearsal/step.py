"""Rehearses optimizer steps of a recipe: `python -m rehearsal.step CONFIG [--set KEY=VALUE]... [--steps N]`.

Prints what the last step did as one line of JSON.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction

from rehearsal import played_torch_cuda
from rehearsal.played_torch_cuda import DEVICE
from rehearsal.watch import Counts, Watch, WatchedFunctions
from sslrun import session
from sslrun.config import load
from sslrun.contract import Batch, Progress
from sslrun.nn.norm import RunningStatistics
from sslrun.optim import learning_rates
from sslrun.plan import Plan, choose_machine, make_plan
from sslrun.recipe import EngineConfig, Recipe
from sslrun.step_metrics import StepMetrics
from sslrun.train import train_step

FIRST_STEP = 100  # not 0: schedules and warm-ups are under way
SAMPLES = 100_000  # rows of the buffers of methods that remember samples
# A rehearsal is of the eager step: what a compiler or a graph does with it needs a device.
EAGER = [f"engine.{key}=off" for key in ("compile", "cuda_graphs") if key in {f.name for f in fields(EngineConfig)}]


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Watches operators, functions, events and Triton's launches."""

    def launched(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        tensors = [arg for arg in (*args, *options.values()) if isinstance(arg, torch.Tensor)]
        watch.launch(f"triton::{kernel.__name__}", tensors, [])

    run, JITFunction.run = JITFunction.run, launched
    played_torch_cuda.on_synchronize.append(watch.synchronized)
    try:
        with WatchedFunctions(watch), watch:
            yield watch
    finally:
        JITFunction.run = run
        played_torch_cuda.on_synchronize.remove(watch.synchronized)


def recipe_of(config: str, settings: list[str], samples: int = SAMPLES) -> Recipe:
    """The recipe's objects, on the CPU."""
    recipe = session.build(load(config, [*settings, *EAGER]))
    recipe.model.prepare(samples)
    return recipe


def batch_of(recipe: Recipe, size: int) -> Batch:
    """A batch as the loader delivers it."""
    views = [
        torch.empty(group.num_views * size, *group.size, 3, device=DEVICE).permute(0, 3, 1, 2)
        for group in recipe.data.views
    ]
    index, label = (torch.empty(size, dtype=torch.long, device=DEVICE) for _ in range(2))
    return Batch(views, index, label)


def rehearse(recipe: Recipe, plan: Plan, steps: int = 2) -> Counts:
    """What the last of some optimizer steps does, with the metrics' means as the training loop takes them."""
    method, mode = recipe.model, FakeTensorMode(allow_non_fake_inputs=False)
    played_torch_cuda.fake_on_cuda(method, mode)
    with mode:
        executor = session._executor(recipe, plan, DEVICE)
        statistics, metrics = RunningStatistics(method), StepMetrics()
        for step in range(FIRST_STEP, FIRST_STEP + steps):
            played_torch_cuda.next_step()
            with watching(Watch()) as watch:
                batches = [batch_of(recipe, plan.machine.micro_batch) for _ in range(plan.accumulation)]
                state = [value for values in executor.optimizer.state.values() for value in values.values()]
                watch.hold([*method.parameters(), *method.buffers(), *(s for s in state if s is not None)])
                watch.start()
                progress = Progress(step, plan.total_steps, plan.steps_per_epoch, recipe.seed)
                groups = executor.optimizer.param_groups
                rates = learning_rates(groups, recipe.lr, step, plan.steps_per_epoch, plan.total_steps)
                made, _ = train_step(executor, method, statistics, batches, progress, rates)
                metrics.add(made)
                del batches, made
        return watch.counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    recipe = recipe_of(args.config, args.set)
    machine = choose_machine(recipe, DEVICE, 1, 1)
    plan = make_plan(recipe, SAMPLES, machine, 1)
    plan = replace(plan, total_steps=max(plan.total_steps, 1000))
    counts = rehearse(recipe, plan, args.steps)
    print(json.dumps({"plan": asdict(plan), **vars(counts)}))


if __name__ == "__main__":
    main()
