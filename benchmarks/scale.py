"""What a step costs with more views, keys, prototypes and ranks, and what memory the steps of all methods take.

    python benchmarks/scale.py [--quick] [--axis views keys prototypes ranks methods] [--rounds 5]

Networks and images are those of configs/quickstart.toml and configs/learn; only the named number changes. The values of
an axis alternate in one run. `core_ms` is processor time per step, of all ranks together, which other work on the
machine changes little; `wall_ms` is by the clock. `step_mib` is what a process of its own takes during its first three
steps beyond what it holds before them, network and queue included in the latter: on the CPU, float32. Ranks meet over
gloo, with the recipe's global batch divided among them; their times are those of 20 steps of `sslrun`, first ones and
loader included, less those of two steps. Takes about 8 minutes, by
estimate; less with `--quick`.
"""

import argparse
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

from sslrun.config import load

CPU = torch.device("cpu")
# By axis: the recipe, the keys that change, and their values.
AXES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "views": ("learn/swav", "data.views.0.num_views", (2, 4, 8)),
    "keys": ("quickstart", "model.queue_len", (512, 8192, 65536)),
    "prototypes": ("learn/swav", "model.head.num_prototypes", (256, 3072, 24576)),
}
RANKS, GROUP = (1, 2, 4), 16
RANK_STEPS = (2, 22)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", nargs="+", choices=[*AXES, "ranks", "methods"], default=[*AXES, "ranks", "methods"])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each value; at least two")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--only", nargs="+", metavar=("RECIPE", "SETTING"), help="print a step's memory, in MiB")
    parser.add_argument("--dry-run", action="store_true", help="print, append no row")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 2
    if args.only:
        print(step_mib(*args.only))
        return
    for axis in args.axis:
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
        "step_mib": {str(value): round(alone(recipe, f"{key}={value}"), 1) for value in values},
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
    return {"step_mib": {recipe: round(alone(recipe), 1) for recipe in recipes}}


def step_of(recipe: str, *settings: str) -> EngineStep:
    """A step of a recipe, on the CPU."""
    return engine_step(load(str(ROOT / f"configs/{recipe}.toml"), ["engine.device=cpu", *settings]), CPU)


def step_mib(recipe: str, *settings: str) -> float:
    """MiB that this process takes during three steps beyond what it holds before them."""
    step = step_of(recipe, *settings)
    before = resident_mib("VmRSS")
    timed(step, 3, CPU)
    return resident_mib("VmHWM") - before


def alone(*recipe: str) -> float:
    """`step_mib` of a process of its own."""
    command = [sys.executable, __file__, "--only", *recipe]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def own_s() -> float:
    """Processor time of this process and of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    main()
