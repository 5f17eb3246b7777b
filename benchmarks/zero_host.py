"""Compares a step of ZeRO 0, 1 and 2 with plain data parallelism, on a small network with many tensors.

    python benchmarks/zero_host.py [--steps 20] [--rounds 15] [--profile SIDE]

Two ranks meet over gloo on the CPU. The network is a narrow vision transformer of 152 tensors, so that a step is mostly
what the host does for each tensor: DeepSpeed's hooks and copies, the norm, the optimizer.

`ddp` is a bare loop with torch's DistributedDataParallel. `plain` is the engine's executor for float64, in float32: it
averages all gradients as one tensor after the backward pass. The others are the executor over DeepSpeed; in `zero 1 of
DeepSpeed` it averages the gradients too, as it did before the engine averaged those of stage 1 itself. All of them
measure and clip the norm of the gradient. Sides alternate in one run. The row has two times of a step on rank 0:
`wall_ms`, and `host_ms`, the CPU time of the thread that runs the step, in which waiting for others does not count.
"""

import argparse
import cProfile
import os
import pstats
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from rows import append_row, quantiles
from torch import Tensor, nn

from sslrun.contract import Batch, Loss, Method, Progress
from sslrun.nn.vit import VisionTransformer
from sslrun.runtime import distributed
from sslrun.runtime.deepspeed_executor import DeepSpeedExecutor
from sslrun.runtime.executor import Executor
from sslrun.runtime.replicated_executor import ReplicatedExecutor

RANKS, BATCH, SIZE = 2, 2, 16
CPU = torch.device("cpu")
SIDES = ("ddp", "plain", "zero 0", "zero 1", "zero 1 of DeepSpeed", "zero 2")


class Small(Method):
    """Regression of a constant by a narrow vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = VisionTransformer(
            img_size=SIZE, patch_size=8, embed_dim=32, depth=12, num_heads=2, frozen_patch_embed=False
        )
        self.backbone.pos_embed.requires_grad_(True)
        self.head = nn.Linear(32, 8)

    def targets(self, batches: list[Batch], progress: Progress) -> list[None]:
        return [None for _ in batches]

    def loss(self, images: Tensor) -> Tensor:
        return (self.head(self.backbone(images)[0]) - 1).square().mean()

    def forward(self, batch: Batch, progress: Progress, targets: None) -> Loss:
        return Loss(self.loss(batch.views[0]), {}, {})


class Bare(nn.Module):
    """The loss, as DistributedDataParallel wants it: from a call of the module."""

    def __init__(self, method: Small) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: Tensor) -> Tensor:
        return self.method.loss(images)


class Unaided(DeepSpeedExecutor):
    """Stage 1 with the gradients averaged by DeepSpeed."""

    def _leave_gradients(self) -> None:
        pass

    def _average_parts(self) -> list[Tensor]:
        return [part for parts in self.engine.optimizer.averaged_gradients.values() for part in parts]


def groups(method: Small) -> list[dict[str, Any]]:
    """Matrices with weight decay and the others without, as recipes have them."""
    parameters = list(method.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]


def adamw(method: Small) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(method), lr=1e-3, weight_decay=0.05, fused=True)


def make(side: str) -> Callable[[], None]:
    """A function that runs one step."""
    method = Small()
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(distributed.rank()))
    if side == "ddp":
        model = nn.parallel.DistributedDataParallel(Bare(method), gradient_as_bucket_view=True)
        optimizer, parameters = adamw(method), list(method.parameters())

        def bare() -> None:
            model(images).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return bare
    options: dict[str, Any] = {"device": CPU, "grad_clip": 1.0}
    if side == "plain":
        executor: Executor = ReplicatedExecutor(method, adamw(method), **options)
    else:
        kind = Unaided if side.endswith("of DeepSpeed") else DeepSpeedExecutor
        executor = kind(method, adamw(method), zero_stage=int(side.split()[1]), **options)
    batch, progress = Batch([images], torch.arange(BATCH), None), Progress(0, 100, 10, 0)

    def step() -> None:
        (target,) = executor.targets([batch], progress)
        executor.backward(executor.forward(batch, progress, target).value)
        executor.step([1e-3, 1e-3])

    return step


def timed(step: Callable[[], None], steps: int) -> tuple[float, float]:
    """(wall, host) milliseconds of a step."""
    torch.distributed.barrier()
    wall, host = time.perf_counter(), time.thread_time()
    for _ in range(steps):
        step()
    return 1e3 * (time.perf_counter() - wall) / steps, 1e3 * (time.thread_time() - host) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps per round")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each side")
    parser.add_argument("--profile", choices=SIDES, help="print where one side spends its time, and write no row")
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS)]
        subprocess.run([*launcher, *sys.argv], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return
    torch.set_num_threads(1)
    distributed.init(CPU)
    if args.profile:
        profile(make(args.profile), args.steps * args.rounds)
    else:
        measure(args.steps, args.rounds)
    distributed.shutdown()


def profile(step: Callable[[], None], steps: int) -> None:
    timed(step, 10)
    profiler = cProfile.Profile(time.thread_time)
    profiler.runcall(timed, step, steps)
    if distributed.rank() == 0:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(45)


def measure(steps: int, rounds: int) -> None:
    sides = {side: make(side) for side in SIDES}
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    load = os.getloadavg()[0]
    for step in sides.values():
        timed(step, max(5, steps // 2))  # warm-up
    for i in range(rounds):
        for side in SIDES if i % 2 else reversed(SIDES):
            times[side].append(timed(sides[side], steps))
    if distributed.rank() > 0:
        return
    row: dict[str, Any] = {
        "benchmark": "zero_host",
        "tensors": len(list(Small().parameters())),
        "ranks": RANKS,
        "threads": 1,
        "steps": steps,
        "load_before": round(load, 2),
    }
    for kind, place in (("wall_ms", 0), ("host_ms", 1)):
        row[kind] = {side: quantiles([each[place] for each in times[side]]) for side in SIDES}
        for side in ("zero 1", "zero 1 of DeepSpeed"):
            for other in ("ddp", "plain", "zero 0"):
                ratios = [a[place] / b[place] for a, b in zip(times[side], times[other], strict=True)]
                row[f"{kind.removesuffix('_ms')}: {side} over {other}"] = quantiles(ratios)
    append_row("zero_host", row)
    for side in SIDES:
        print(f"{side}: {row['wall_ms'][side]['median']:.2f} ms, host {row['host_ms'][side]['median']:.2f} ms")
    for key, value in row.items():
        if " over " in key:
            print(f"{key}: {value['median']:.3f} ({value['p25']:.3f} to {value['p75']:.3f})")


if __name__ == "__main__":
    main()
