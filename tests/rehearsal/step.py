"""Rehearses optimizer steps of recipes: `python -m rehearsal.step [--full] NAME...`, with names of `cases.CASES` or
`faults.CASES`.

Prints for each what its last step did, as one line of JSON.
"""

import argparse
import contextlib
import json
import os
import traceback
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from triton.runtime.jit import JITFunction

import native_norm
from rehearsal import cases, faults, played_torch_cuda
from rehearsal.cases import Case
from rehearsal.played_torch_cuda import DEVICE
from rehearsal.watch import Counts, Watch
from sslrun import run_parts, session
from sslrun.config import load
from sslrun.contract import Batch, Progress
from sslrun.nn import transformer
from sslrun.nn.norm import RunningStatistics
from sslrun.nn.packing import Layout, attention
from sslrun.optim import learning_rates
from sslrun.plan import Plan, choose_machine, make_plan
from sslrun.recipe import EngineConfig, Recipe
from sslrun.rehearsal import masks_like
from sslrun.runtime import distributed
from sslrun.runtime.executor import Executor, LocalExecutor
from sslrun.step_metrics import StepMetrics
from sslrun.training import train_step

FIRST_STEP = 100  # not 0: schedules and warm-ups are under way
NUM_STEPS = 2  # the first makes the optimizer's state and tables; the second is like all that follow
SAMPLES = 100_000  # rows of the buffers of methods that remember samples
# A rehearsal is of the eager step: what a compiler or a graph does with it needs a device.
EAGER = [f"engine.{key}=off" for key in ("compile", "cuda_graphs") if key in {f.name for f in fields(EngineConfig)}]


class OneOfMany(LocalExecutor):
    """One of several ranks without DeepSpeed, whose sharding and all-reduce of gradients are not rehearsed."""

    __init__ = Executor.__init__  # type: ignore[assignment]


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Watches operators, events and Triton's launches."""

    def launched(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        tensors = [arg for arg in (*args, *options.values()) if isinstance(arg, torch.Tensor)]
        watch.launch(f"triton::{kernel.__name__}", tensors, [])

    def attended(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
        watch.packed.put(layout.bounds, layout.sizes)
        return attention(query, key, value, layout)

    run, JITFunction.run = JITFunction.run, launched
    transformer.attention = attended
    played_torch_cuda.on_synchronize.append(watch.synchronized)
    try:
        with watch:
            yield watch
    finally:
        JITFunction.run = run
        transformer.attention = attention
        played_torch_cuda.on_synchronize.remove(watch.synchronized)


@contextlib.contextmanager
def played_ranks(count: int) -> Iterator[None]:
    """This process is rank 0 of `count`; collectives have results of the right shape."""
    if count == 1:
        yield
        return
    native_norm.register()
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update({name: str(count) for name in names} | {"RANK": "0", "LOCAL_RANK": "0"})
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name in (*names, "RANK", "LOCAL_RANK"):
            del os.environ[name]


def batch_of(recipe: Recipe, size: int, precision: str = "bf16") -> Batch:
    """A batch as the loader delivers it."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    views = [
        torch.empty(group.num_views * size, *group.size, 3, dtype=dtype, device=DEVICE).permute(0, 3, 1, 2)
        for group in recipe.data.views
    ]
    index, label = (torch.empty(size, dtype=torch.long, device=DEVICE) for _ in range(2))
    return Batch(views, index, label, masks_like(recipe.data.views, size, DEVICE))


def rehearse(recipe: Recipe, plan: Plan, num_steps: int = NUM_STEPS) -> Counts:
    """What the last of some optimizer steps does; with it what the training loop does between two steps."""
    method, mode = recipe.model, FakeTensorMode(allow_non_fake_inputs=False)
    played_torch_cuda.fake_on_cuda(method, mode)
    with mode:
        executor = _executor(recipe, plan)
        statistics, metrics, vote = RunningStatistics(method), StepMetrics(), distributed.Vote(DEVICE)
        for step in range(FIRST_STEP, FIRST_STEP + num_steps):
            played_torch_cuda.next_step()
            with watching(Watch(mode)) as watch:
                machine = plan.machine
                batches = [batch_of(recipe, machine.micro_batch, machine.precision) for _ in range(plan.accumulation)]
                state = [value for values in executor.optimizer.state.values() for value in values.values()]
                watch.hold([*method.parameters(), *method.buffers(), *(s for s in state if s is not None)])
                watch.start()
                progress = Progress(step, plan.total_steps, plan.steps_per_epoch, recipe.seed)
                groups = executor.optimizer.param_groups
                rates = learning_rates(groups, recipe.lr, progress)
                vote.cast(0)
                made, _ = train_step(executor, method, statistics, batches, progress, rates)
                metrics.add(made)
                del batches, made
        return watch.counts


def _executor(recipe: Recipe, plan: Plan) -> Executor:
    """The executor that a run has; on several ranks one that shards nothing."""
    if plan.world_size == 1:
        return run_parts.make_executor(recipe, plan, DEVICE)
    executor_of_one, run_parts.LocalExecutor = run_parts.LocalExecutor, OneOfMany  # type: ignore[misc]
    try:
        return run_parts.make_executor(recipe, replace(plan, world_size=1), DEVICE)
    finally:
        run_parts.LocalExecutor = executor_of_one  # type: ignore[misc]


def rehearsed(case: Case, is_full: bool) -> dict[str, Any]:
    """The plan of a case and the counts of a step; or its `error`."""
    recipe = _recipe(case, is_full)
    with played_ranks(case.ranks):
        machine = choose_machine(recipe, DEVICE, case.ranks, case.ranks)
        plan = make_plan(recipe, SAMPLES, machine, case.ranks)
        try:
            counts = rehearse(_recipe(case, is_full, case.fault) if case.fault else recipe, plan)
        except Exception:
            return {"plan": asdict(plan), "error": traceback.format_exc()}
    group = recipe.data.samples_per_gpu
    groups = plan.global_batch // plan.world_size // group
    expected = machine.memory.total(groups, machine.micro_batch // group)
    return {"plan": asdict(plan), "expected_bytes": expected, **vars(counts)}


def _recipe(case: Case, is_full: bool, more: tuple[str, ...] = ()) -> Recipe:
    recipe = session.build(load(case.config, [*case.settings, *more, *EAGER]))
    if not is_full:
        recipe.global_batch = case.groups * recipe.data.samples_per_gpu
    recipe.model.prepare(SAMPLES)
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    known = cases.CASES | faults.CASES
    for name in args.names:
        print(json.dumps({"case": name, **rehearsed(known[name], args.full)}), flush=True)


if __name__ == "__main__":
    main()
