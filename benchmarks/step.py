"""Compares a training step of the engine with a bare loop over the same network, alternating in one run.

    python benchmarks/step.py [CONFIG] [--set KEY=VALUE]... [--steps 20] [--rounds 9]

Both sides run the recipe's model on the same batch in memory: forward passes of both encoders, loss, backward pass,
optimizer, momentum update, queue. The bare loop is what one would write by hand, without checks, metrics, log,
schedules or BatchNorm groups: `torch.nn.BatchNorm2d`, `loss.backward()`, `optimizer.step()`. It computes in the
engine's precision, and its networks are compiled where the engine's are: on a GPU unless `--set engine.compile=off`.
Rounds alternate, so that noise affects both sides; the row has the quantiles of each side and of the ratios of
neighboring rounds. Peak memory, of the GPU or of a process on the CPU, is that of processes that run one side only.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
import torch.nn.functional as F
from engine_step import engine_step, random_batch, set_up, timed
from rows import append_row, quantiles
from torch import nn

from sslrun.config import Config, load
from sslrun.nn.norm import GroupBatchNorm
from sslrun.plan import choose_machine, device_of
from sslrun.session import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs/quickstart.toml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--steps", type=int, default=20, help="steps per round")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each side")
    parser.add_argument("--only", choices=SIDES, help="run one side for its peak memory, in MiB")
    args = parser.parse_args()
    # One BatchNorm group, so that both sides compute the same, and one micro-batch.
    config = load(args.config, [*args.overrides])
    group = config.values["global_batch"]
    config = load(args.config, [*args.overrides, f"data.samples_per_gpu={group}", f"engine.micro_batch={group}"])
    device = device_of(build(config), 0)
    if args.only:
        timed(SIDES[args.only](config, device), 5, device)
        print(peak_mib(device))
        return
    sides = {name: make(config, device) for name, make in SIDES.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for step in sides.values():
        timed(step, max(3, args.steps // 4), device)  # warm-up
    for round_number in range(args.rounds):
        for name in sorted(sides, reverse=round_number % 2 == 0):  # sides alternate in the first place
            times[name].append(timed(sides[name], args.steps, device) / args.steps)
    overhead = [100 * (e / b - 1) for e, b in zip(times["engine"], times["bare"], strict=True)]
    machine = choose_machine(build(config), device, 1, 1)
    row = {
        "benchmark": "step",
        "config": config.name,
        "batch": group,
        "threads": machine.threads,
        "precision": machine.precision,
        "compile": machine.compile,
        "steps": args.steps,
        "bare_ms": quantiles([1e3 * t for t in times["bare"]]),
        "engine_ms": quantiles([1e3 * t for t in times["engine"]]),
        "overhead_pct": quantiles(overhead),
        "peak_mib" if device.type == "cuda" else "peak_rss_mib": {name: peak_mib_alone(args, name) for name in sides},
    }
    append_row("step", row)
    print(f"bare {row['bare_ms']['median']:.2f} ms, engine {row['engine_ms']['median']:.2f} ms per step of {group}")
    print(f"peak memory: {row.get('peak_mib') or row.get('peak_rss_mib')} MiB")
    print(
        f"overhead: median {row['overhead_pct']['median']:+.2f} %, quartiles {row['overhead_pct']['p25']:+.2f} "
        f"{row['overhead_pct']['p75']:+.2f} %"
    )


def peak_mib(device: torch.device) -> float:
    """Peak memory so far: allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status").read_text()  # ru_maxrss would include the parent process
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak_mib_alone(args: argparse.Namespace, side: str) -> float:
    """Peak memory of a separate process that runs one side only."""
    overrides = [word for override in args.overrides for word in ("--set", override)]
    command = [sys.executable, __file__, args.config, *overrides, "--only", side]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def bare_loop(config: Config, device: torch.device) -> Callable[[], None]:
    """A function that runs one step of MoCo v2, written by hand."""
    recipe = build(config)
    machine = choose_machine(recipe, device, 1, 1)
    set_up(machine, device)
    model = recipe.model
    use_plain_batch_norm(model)
    model.to(device).to(memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = recipe.optimizer.create(model.named_parameters())
    query = nn.Sequential(model.backbone, LastMap(), model.neck)
    key = nn.Sequential(model.key_backbone, LastMap(), model.key_neck)
    followers = list(key.parameters())
    if machine.compile:
        query.compile(dynamic=False)
        key.compile(dynamic=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=machine.precision == "bf16")
    queue, temperature = model.queue.rows, model.head.temperature
    first, second = random_batch(recipe, machine, device).crops()
    place = 0

    def run() -> None:
        nonlocal place
        with torch.no_grad(), autocast:
            order = torch.randperm(len(second), device=device)
            k = F.normalize(key(second[order]).float(), dim=1)[order.argsort()]
        with autocast:
            q = F.normalize(query(first).float(), dim=1)
            logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature
            loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(followers, trained, 1 - model.momentum)
            queue[place : place + len(k)] = k
            place = (place + len(k)) % (len(queue) // len(k) * len(k))

    return run


class LastMap(nn.Module):
    """The last of the backbone's feature maps."""

    def forward(self, maps):
        return maps[-1]


def use_plain_batch_norm(model: nn.Module) -> None:
    """Replace the engine's BatchNorm layers with torch's."""
    for name, child in model.named_children():
        if isinstance(child, GroupBatchNorm):
            plain = nn.BatchNorm2d(child.num_features)
            plain.requires_grad_(child.weight.requires_grad)
            setattr(model, name, plain)
        else:
            use_plain_batch_norm(child)


SIDES: dict[str, Callable[[Config, torch.device], Callable[[], object]]] = {"bare": bare_loop, "engine": engine_step}


if __name__ == "__main__":
    main()
