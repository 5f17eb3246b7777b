"""Compares a training step of the engine with a bare loop over the same network, alternating in one run.

    python benchmarks/step.py [CONFIG] [--steps 60] [--rounds 5]

Both sides run the recipe's model on the same batch in memory: forward passes of both encoders, loss, backward pass,
SGD, momentum update, queue. The bare loop is what one would write by hand, without checks, metrics, log, schedules or
BatchNorm groups: `torch.nn.BatchNorm2d`, `loss.backward()`, `optimizer.step()`. Rounds alternate, so that noise affects
both sides; the row has the quantiles of each side and of the ratios of neighboring rounds.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
import torch.nn.functional as F
from rows import append_row, quantiles
from torch import nn

from sslrun.config import load
from sslrun.contract import Batch, Progress
from sslrun.nn.norm import GroupBatchNorm, RunningStatistics, set_groups
from sslrun.optim import learning_rates
from sslrun.plan import choose_machine, device_of
from sslrun.runtime.executor import LocalExecutor
from sslrun.session import build
from sslrun.step_metrics import StepMetrics
from sslrun.train import train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs/quickstart.toml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--steps", type=int, default=20, help="steps per round")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each side")
    parser.add_argument("--only", choices=("bare", "engine"), help="run one side for its peak memory, in MiB")
    args = parser.parse_args()
    # One BatchNorm group, so that both sides compute the same, and one micro-batch.
    config = load(args.config, [*args.overrides])
    group = config.values["global_batch"]
    config = load(args.config, [*args.overrides, f"data.samples_per_gpu={group}", f"engine.micro_batch={group}"])
    recipe = build(config)
    device = device_of(recipe, 0)
    machine = choose_machine(recipe, device, 1, 1)
    torch.set_num_threads(machine.threads)
    batch = _batch(recipe.data.views[0].size, group, device)
    if args.only:
        side = bare_loop(recipe, batch, device) if args.only == "bare" else engine_loop(recipe, machine, batch, device)
        _timed(side, 5, device)
        status = Path("/proc/self/status").read_text()  # ru_maxrss would include the parent process
        print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
        return
    sides = {"bare": bare_loop(build(config), batch, device), "engine": engine_loop(recipe, machine, batch, device)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for step in sides.values():
        _timed(step, max(3, args.steps // 4), device)  # warm-up
    for round_number in range(args.rounds):
        for name in sorted(sides, reverse=round_number % 2 == 0):  # sides alternate in the first place
            times[name].append(_timed(sides[name], args.steps, device) / args.steps)
    overhead = [100 * (e / b - 1) for e, b in zip(times["engine"], times["bare"], strict=True)]
    row = {
        "benchmark": "step",
        "config": config.name,
        "batch": group,
        "threads": machine.threads,
        "precision": machine.precision,
        "steps": args.steps,
        "bare_ms": quantiles([1e3 * t for t in times["bare"]]),
        "engine_ms": quantiles([1e3 * t for t in times["engine"]]),
        "overhead_pct": quantiles(overhead),
        "peak_rss_mib": {name: _peak_memory_mib(args, name) for name in sides},
    }
    append_row("step", row)
    print(f"bare {row['bare_ms']['median']:.2f} ms, engine {row['engine_ms']['median']:.2f} ms per step of {group}")
    print(f"peak memory: {row['peak_rss_mib']} MiB")
    print(
        f"overhead: median {row['overhead_pct']['median']:+.2f} %, quartiles {row['overhead_pct']['p25']:+.2f} "
        f"{row['overhead_pct']['p75']:+.2f} %"
    )


def _peak_memory_mib(args: argparse.Namespace, side: str) -> float:
    """Peak resident memory of a separate process that runs one side only."""
    overrides = [word for override in args.overrides for word in ("--set", override)]
    command = [sys.executable, __file__, args.config, *overrides, "--only", side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def engine_loop(recipe, machine, batch, device):
    """A function that runs one step of the engine, metrics included."""
    set_groups(recipe.model, recipe.data.samples_per_gpu, machine.micro_batch // recipe.data.samples_per_gpu)
    optimizer = recipe.optimizer.create(recipe.model.named_parameters())
    executor = LocalExecutor(recipe.model, optimizer, device=device, precision=machine.precision)
    statistics, step_metrics, step = RunningStatistics(recipe.model), StepMetrics(), 0

    def run() -> None:
        nonlocal step
        progress = Progress(step, 10_000, 100, recipe.seed)
        rates = learning_rates(executor.optimizer.param_groups, recipe.lr, step, 100, 10_000)
        metrics, _ = train_step(executor, recipe.model, statistics, [batch], progress, rates)
        step_metrics.add(metrics)
        step += 1

    return run


def bare_loop(recipe, batch, device):
    """A function that runs one step of MoCo v2, written by hand."""
    model = recipe.model
    _use_plain_batch_norm(model)
    model.to(device).to(memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = recipe.optimizer.create(model.named_parameters())
    query = nn.Sequential(model.backbone, _Last(), model.neck)
    key = nn.Sequential(model.key_backbone, _Last(), model.key_neck)
    queue, temperature = model.queue.rows, model.head.temperature
    first, second = batch.crops()
    place = 0

    def run() -> None:
        nonlocal place
        with torch.no_grad():
            order = torch.randperm(len(second), device=device)
            k = F.normalize(key(second[order]), dim=1)[order.argsort()]
        q = F.normalize(query(first), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(key.parameters()), trained, 1 - model.momentum)
            queue[place : place + len(k)] = k
            place = (place + len(k)) % (len(queue) // len(k) * len(k))

    return run


class _Last(nn.Module):
    def forward(self, maps):
        return maps[-1]


def _use_plain_batch_norm(model: nn.Module) -> None:
    for name, child in model.named_children():
        if isinstance(child, GroupBatchNorm):
            plain = nn.BatchNorm2d(child.num_features)
            plain.requires_grad_(child.weight.requires_grad)
            setattr(model, name, plain)
        else:
            _use_plain_batch_norm(child)


def _batch(size: tuple[int, int], samples: int, device: torch.device) -> Batch:
    images = torch.randn(2 * samples, 3, *size).to(memory_format=torch.channels_last)
    return Batch([images], torch.arange(samples), None).to(device)


def _timed(step, count: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
