"""What a step costs with more views, keys, prototypes and ranks, what memory the steps of all methods take, and what a
start costs with more files.

    python benchmarks/scale.py [--quick] [--axis views keys prototypes ranks methods files] [--rounds 5]

Networks and images are those of configs/quickstart.toml and configs/learn; only the named number changes. The values of
an axis alternate in one run. `core_ms` is processor time per step, of all ranks together, which other work on the
machine changes little; `wall_ms` is by the clock. Ranks meet over gloo, with the recipe's global batch divided among
them; their times are those of 20 steps of `sslrun`, first ones and loader included, less those of two steps.

Memory is that of steps on the CPU in float32, beyond network, queue and images, in a process of its own: `step_mib` is
what torch has allocated and not freed, at the peak of the first two steps, counted by torch's profiler at each
allocation and thus the same in each run; `resident_mib` is by how much the process grows in three steps, libraries
included. `expected_mib` is the sum of gradients, optimizer state and activations that `--dry-run` counts without
computing a step; it is a bound, since not all gradients are there when there are most activations.

`files` calls `many_files.py`, whose rows are in a file of their own: 10^4 and 10^5 files, and the tables of 10^7 names.
Takes about 12 minutes, by estimate; less with `--quick`.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from engine_step import EngineStep, engine_step, timed
from gradient_cache import resident_mib
from passes import busy_s
from rows import append_row, quantiles
from torch.profiler import ProfilerActivity, profile

from sslrun.config import load
from sslrun.rehearsal import rehearse

CPU = torch.device("cpu")
# By axis: the recipe, the keys that change, and their values.
AXES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "views": ("learn/swav", "data.views.0.num_views", (2, 4, 8)),
    "keys": ("quickstart", "model.queue_len", (512, 8192, 65536)),
    "prototypes": ("learn/swav", "model.head.num_prototypes", (256, 3072, 24576)),
}
RANKS, GROUP = (1, 2, 4), 16
RANK_STEPS = (2, 22)
FILES = (["10000"], ["100000"], ["10000000", "--names-only"])
ALL = [*AXES, "ranks", "methods", "files"]
Memory = dict[str, float]  # figures of a step, in MiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each value; at least two")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument(
        "--only", nargs="+", metavar=("RECIPE", "SETTING"), help="print a step's memory, in MiB, as JSON"
    )
    parser.add_argument("--dry-run", action="store_true", help="print, append no row")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 2
    if args.only:
        print(json.dumps(memory(*args.only)))
        return
    for axis in args.axis:
        if axis == "files":
            for words in () if args.dry_run else FILES[: 2 if args.quick else 3]:
                subprocess.run([sys.executable, str(ROOT / "benchmarks/many_files.py"), *words], check=True)
            continue
        begin = time.perf_counter(), busy_s(), own_s()
        if axis == "ranks":
            row = ranks(args.rounds)
        elif axis == "methods":
            row = methods()
        else:
            row = values_of(axis, args.rounds, args.steps)
        wall, busy, own = (
            now - then for now, then in zip((time.perf_counter(), busy_s(), own_s()), begin, strict=True)
        )
        row = {
            "benchmark": "scale",
            "axis": axis,
            **row,
            "other_load": round(max(0.0, (busy - own) / wall), 2),
            "load_average": round(os.getloadavg()[1], 1),
        }
        if not args.dry_run:
            append_row("scale", row)
        print(axis, {name: row[name] for name in ("core_ms", "step_mib") if name in row}, flush=True)


def values_of(axis: str, rounds: int, steps: int) -> dict[str, Any]:
    """Times and memory of a step at each value of an axis."""
    recipe, key, values = AXES[axis]
    made = {value: step_of(recipe, f"{key}={value}") for value in values}
    wall: dict[int, list[float]] = {value: [] for value in values}
    core: dict[int, list[float]] = {value: [] for value in values}
    for step in made.values():
        timed(step, 1, CPU)
    for number in range(rounds):
        for value in sorted(values, reverse=number % 2 == 0):
            begin = time.process_time()
            wall[value].append(timed(made[value], steps, CPU) / steps)
            core[value].append((time.process_time() - begin) / steps)
    return {
        "config": recipe,
        "key": key,
        "batch": made[values[0]].plan.global_batch,
        "threads": torch.get_num_threads(),
        "wall_ms": {str(value): quantiles([1e3 * s for s in wall[value]]) for value in values},
        "core_ms": {str(value): quantiles([1e3 * s for s in core[value]]) for value in values},
        **by_figure({str(value): alone(recipe, f"{key}={value}") for value in values}),
    }


def ranks(rounds: int) -> dict[str, Any]:
    """Times of a step of the quickstart on several ranks, by the difference of a long and a short run."""
    wall: dict[int, list[float]] = {count: [] for count in RANKS}
    core: dict[int, list[float]] = {count: [] for count in RANKS}
    for number in range(max(2, rounds // 2)):
        for count in sorted(RANKS, reverse=number % 2 == 0):
            (short_wall, short_core), (long_wall, long_core) = (run_of(count, steps) for steps in RANK_STEPS)
            steps = RANK_STEPS[1] - RANK_STEPS[0]
            wall[count].append((long_wall - short_wall) / steps)
            core[count].append((long_core - short_core) / steps)
    return {
        "config": "quickstart",
        "key": f"--devices, with data.samples_per_gpu = {GROUP}",
        "batch": load(str(ROOT / "configs/quickstart.toml")).values["global_batch"],
        "threads": 1,
        "wall_ms": {str(count): quantiles([1e3 * s for s in wall[count]]) for count in RANKS},
        "core_ms": {str(count): quantiles([1e3 * s for s in core[count]]) for count in RANKS},
    }


def run_of(count: int, steps: int) -> tuple[float, float]:
    """Seconds by the clock, and of processor time, of a run of the quickstart."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "ranks.toml"
        recipe.write_text(
            f'extends = "{ROOT}/configs/quickstart.toml"\n_delete_ = ["epochs", "monitor"]\nmax_iters = {steps}\n'
            f'work_dir = "{folder}"\ndata.samples_per_gpu = {GROUP}\nengine.device = "cpu"\n',
            encoding="utf-8",
        )
        command = [sys.executable, str(ROOT / "bin/sslrun"), str(recipe), "--devices", str(count)]
        begin = time.perf_counter(), own_s()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - begin[0], own_s() - begin[1]


def methods() -> dict[str, Any]:
    """Memory of a step of every method at the scale of the quickstart."""
    recipes = ["quickstart", *(f"learn/{path.stem}" for path in sorted((ROOT / "configs/learn").glob("*.toml")))]
    return by_figure({recipe: alone(recipe) for recipe in recipes})


def by_figure(found: dict[str, Memory]) -> dict[str, dict[str, float]]:
    """Figures of several steps, as columns of a row."""
    names = next(iter(found.values()))
    return {name: {key: round(each[name], 1) for key, each in found.items()} for name in names}


def step_of(recipe: str, *settings: str) -> EngineStep:
    """A step of a recipe, on the CPU."""
    return engine_step(load(str(ROOT / f"configs/{recipe}.toml"), ["engine.device=cpu", *settings]), CPU)


def memory(recipe: str, *settings: str) -> Memory:
    """Memory of a step of this process, which has run nothing before."""
    grown = step_of(recipe, *settings)
    Path("/proc/self/clear_refs").write_text("5")  # the most so far becomes what is held now
    before = resident_mib("VmRSS")
    timed(grown, 3, CPU)
    after = resident_mib("VmHWM")
    counted = step_of(recipe, *settings)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(2):
            counted()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    new = step_of(recipe, *settings).recipe
    rehearsed = rehearse(new, "fp32", groups=new.global_batch // new.data.samples_per_gpu)
    expected = rehearsed.gradients + rehearsed.optimizer + rehearsed.activations
    return {"step_mib": max(held) / 2**20, "resident_mib": after - before, "expected_mib": expected / 2**20}


def alone(*recipe: str) -> Memory:
    """`memory` of a process of its own."""
    command = [sys.executable, __file__, "--only", *recipe]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def own_s() -> float:
    """Processor time of this process and of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    main()
