"""Compares a training step of the engine with a bare loop and with lightly's MoCo, alternating in one run.

    python benchmarks/step.py [CONFIG] [--set KEY=VALUE]... [--quick] [--steps 20] [--rounds 9] [--no-peers]

All sides run the recipe's network and optimizer on the same batch in memory: forward passes of both encoders, loss,
backward pass, optimizer, momentum update, queue. The bare loop is what one would write by hand, without checks,
metrics, log, schedules or BatchNorm groups: `torch.nn.BatchNorm2d`, `loss.backward()`, `optimizer.step()`. `lightly` is
the MoCo of lightly's documentation, with its loss, memory bank and momentum update, in a process of its own
(`make peers`); it does not shuffle the keys' batch. All compute in the engine's precision; networks of the first two
are compiled where the engine's are: on a GPU unless `--set engine.compile=off`.

Rounds alternate, so that noise affects all sides; the row has the quantiles of each side and of the ratios of
neighboring rounds, by the clock and by processor time, which other work on the machine changes little. On the CPU it
also has the processor time of each part of a step; parts add up to the whole. Peak memory, of the GPU or of a process
on the CPU, is that of processes that run one side only. Takes about 2 minutes, by
estimate; less with `--quick`.

`--operators` counts instead how many of torch's operators a step of the first two calls on the CPU, part by part: each
costs a microsecond or more beside its arithmetic, and the count is the same on any machine, idle or not.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
import torch.nn.functional as F
from engine_step import engine_step, random_batch, set_up, timed
from passes import busy_s
from peer import NoPeer, Peer, versions
from rows import append_row, quantiles
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sslrun.config import Config, load
from sslrun.nn.norm import GroupBatchNorm
from sslrun.plan import choose_machine, device_of
from sslrun.runtime import heartbeat
from sslrun.runtime.profile import Parts
from sslrun.session import build

CPU = torch.device("cpu")
Mark = Callable[[str], None]
Make = Callable[[Config, torch.device, Mark], Callable[[], object]]
Round = dict[str, Any]  # of one side: `wall_s`, `core_s`, and `parts_s` on the CPU, per step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs/quickstart.toml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--quick", action="store_true", help="five rounds of eight steps")
    parser.add_argument("--steps", type=int, default=20, help="steps per round")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each side")
    parser.add_argument("--no-peers", action="store_true", help="leave out lightly")
    parser.add_argument("--only", choices=SIDES, help="run one side for its peak memory, in MiB")
    parser.add_argument("--operators", action="store_true", help="count the operators of a step; no times")
    parser.add_argument("--dry-run", action="store_true", help="print, append no row")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps = min(args.rounds, 5), min(args.steps, 8)
    # One BatchNorm group, so that all sides compute the same, and one micro-batch.
    group = load(args.config, [*args.overrides]).values["global_batch"]
    overrides = [*args.overrides, f"data.samples_per_gpu={group}", f"engine.micro_batch={group}"]
    config = load(args.config, overrides)
    device = device_of(build(config), 0)
    if args.operators:
        counts = {name: operators(make, config) for name, make in SIDES.items()}
        if not args.dry_run:
            append_row("step", {"benchmark": "step", "config": config.name, "batch": group, "operators": counts})
        for name, parts in counts.items():
            print(f"{name}: {sum(parts.values())} operators ({parts})")
        return
    if args.only:
        timed(SIDES[args.only](config, device, heartbeat.at), 5, device)
        print(peak_mib(device))
        return
    sides: dict[str, Callable[[int], Round]] = {}
    for name, make in SIDES.items():
        sides[name] = own_side(make(config, device, heartbeat.at), device)
    left_out, peer = {}, None
    if not args.no_peers and device.type == "cpu":
        try:
            peer = Peer("moco.py", {"config": args.config, "overrides": overrides})
            sides["lightly"] = lambda steps: peer.ask({"steps": steps})
        except NoPeer as error:
            left_out["lightly"] = str(error)
    rounds: dict[str, list[Round]] = {name: [] for name in sides}
    for side in sides.values():
        side(max(3, args.steps // 4))  # warm-up
    loads = []
    for number in range(args.rounds):
        names, begin = list(sides), (time.perf_counter(), busy_s())
        for name in names[number % len(names) :] + names[: number % len(names)]:  # sides take turns in the first place
            rounds[name].append(sides[name](args.steps))
        wall, busy = (now - then for now, then in zip((time.perf_counter(), busy_s()), begin, strict=True))
        own = args.steps * sum(rounds[name][-1]["core_s"] for name in sides)
        loads.append(max(0.0, (busy - own) / wall))
    if peer is not None:
        peer.close()
    machine = choose_machine(build(config), device, 1, 1)
    row = {
        "benchmark": "step",
        "config": config.name,
        "batch": group,
        "threads": machine.threads,
        "precision": machine.precision,
        "compile": machine.compile,
        "steps": args.steps,
        "sides": {name: figures_of(rounds[name]) for name in sides},
        "over_bare_pct": {name: over(rounds[name], rounds["bare"]) for name in sides if name != "bare"},
        "peak_mib" if device.type == "cuda" else "peak_rss_mib": {name: peak_mib_alone(args, name) for name in SIDES},
        "other_load": quantiles(loads),
        "load_average": round(os.getloadavg()[1], 1),
        **({"left_out": left_out} if left_out else {}),
        "peers": versions(),
    }
    if not args.dry_run:
        append_row("step", row)
    for name, figures in row["sides"].items():
        parts = ", ".join(f"{part} {ms:.2f}" for part, ms in figures.get("parts_core_ms", {}).items())
        print(f"{name}: {figures['ms']['median']:.2f} ms, {figures['core_ms']['median']:.2f} ms of a core ({parts})")
    for name, figures in row["over_bare_pct"].items():
        for clock, pct in figures.items():
            print(f"{name} over bare, {clock}: {pct['median']:+.2f} % ({pct['p25']:+.2f} to {pct['p75']:+.2f})")
    for side, reason in left_out.items():
        print(f"{side} is left out: {reason}")
    print(
        f"peak memory: {row.get('peak_mib') or row.get('peak_rss_mib')} MiB; other load {row['other_load']['median']}"
    )


def own_side(step: Callable[[], object], device: torch.device) -> Callable[[int], Round]:
    """A function that runs a number of steps and returns the seconds of one; with its parts on the CPU."""

    def run(steps: int) -> Round:
        parts = Parts(time.process_time) if device.type == "cpu" else None
        core_s = time.process_time()
        with nullcontext() if parts is None else heartbeat.watched(parts.enter):
            if parts is not None:
                parts.start("before the step")
            wall_s = timed(step, steps, device) / steps
            if parts is not None:
                parts.stop()
        found = {"wall_s": wall_s, "core_s": (time.process_time() - core_s) / steps}
        if parts is not None:
            found["parts_s"] = {name: seconds / steps for name, seconds in parts.seconds.items()}
        return found

    return run


def operators(make: Make, config: Config) -> dict[str, int]:
    """How many operators the parts of a step call on the CPU: those that reach the kernels, after autograd."""
    step = make(config, CPU, heartbeat.at)
    step()
    counts: dict[str, int] = {}
    place = ["before the step"]

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[place[0]] = counts.get(place[0], 0) + 1
            return func(*args, **(kwargs or {}))

    with heartbeat.watched(lambda entered: place.__setitem__(0, entered)), Counting():
        step()
    return counts


def figures_of(rounds: list[Round]) -> dict[str, Any]:
    """Milliseconds of a step of one side; the parts are means over all rounds, so that they add up to a mean step."""
    figures: dict[str, Any] = {
        "ms": quantiles([1e3 * each["wall_s"] for each in rounds]),
        "core_ms": quantiles([1e3 * each["core_s"] for each in rounds]),
    }
    if "parts_s" in rounds[0]:
        means = {name: sum(each["parts_s"][name] for each in rounds) / len(rounds) for name in rounds[0]["parts_s"]}
        figures["parts_core_ms"] = {name: round(1e3 * seconds, 3) for name, seconds in means.items()}
    return figures


def over(side: list[Round], bare: list[Round]) -> dict[str, dict[str, float]]:
    """By how many percent a step takes longer than one of the bare loop, round by round."""
    pairs = list(zip(side, bare, strict=True))
    return {
        "wall": quantiles([100 * (own["wall_s"] / other["wall_s"] - 1) for own, other in pairs]),
        "core": quantiles([100 * (own["core_s"] / other["core_s"] - 1) for own, other in pairs]),
    }


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


def bare_loop(config: Config, device: torch.device, mark: Mark) -> Callable[[], None]:
    """A function that runs one step of MoCo v2, written by hand; `mark` gets the parts of a step, by the engine's
    names."""
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
        mark("targets")
        with torch.no_grad(), autocast:
            order = torch.randperm(len(second), device=device)
            k = F.normalize(key(second[order]).float(), dim=1)[order.argsort()]
        mark("forward")
        with autocast:
            q = F.normalize(query(first).float(), dim=1)
            logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature
            loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=device))
        mark("backward")
        loss.backward()
        mark("update")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark("momentum")
        with torch.no_grad():
            torch._foreach_lerp_(followers, trained, 1 - model.momentum)
            queue[place : place + len(k)] = k
            place = (place + len(k)) % (len(queue) // len(k) * len(k))
        mark("before the step")

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


def whole_step(config: Config, device: torch.device, mark: Mark) -> Callable[[], object]:
    """A function that runs one step of the engine, which tells `heartbeat.at` its parts itself."""
    return engine_step(config, device)


SIDES: dict[str, Make] = {
    "bare": bare_loop,
    "engine": whole_step,
}


if __name__ == "__main__":
    main()
