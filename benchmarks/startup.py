"""How long commands take to start, and where the time to a run's first step goes.

    python benchmarks/startup.py [CONFIG] [--quick] [--rounds 7]

Commands alternate: `--help`, `config print`, a Python that imports torch and nothing else, and a run of CONFIG (the
quickstart) up to the end of its first step, with the stages on the way. `core_s` is processor time, which other work on
the machine changes little; `wall_s` is by the clock. Files are in the disk's cache, and drawn images exist, as from the
second start on. Takes about 2 minutes,
by estimate; less with `--quick`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

STAGES = {  # of a run, by the place of a step that ends them
    "measuring": "set-up of the run",
    "before the step": "measuring the untrained network",
    "reading images": "before the first step",
    "targets": "first batch",
    "end": "first step",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs/quickstart.toml"))
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each command; at least two")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--first-step", metavar="DIR", help="run CONFIG in DIR up to the end of its first step")
    parser.add_argument("--dry-run", action="store_true", help="print, append no row")
    args = parser.parse_args()
    if args.first_step:
        first_step(args.config, args.first_step)
        return
    from passes import busy_s
    from rows import append_row, quantiles

    sslrun = [sys.executable, str(ROOT / "bin/sslrun")]
    rounds = min(args.rounds, 3) if args.quick else args.rounds
    with tempfile.TemporaryDirectory() as folder:
        step = [sys.executable, __file__, args.config, "--first-step", folder]
        commands = {
            "sslrun --help": [*sslrun, "--help"],
            "sslrun config print": [*sslrun, "config", "print", args.config],
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
            "sslrun, up to the end of the first step": step,
        }
        subprocess.run(step, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # draws the images
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        begin = time.perf_counter(), busy_s(), sum(os.times()[:4])
        for _ in range(rounds):
            for name, command in commands.items():
                found[name].append(timed(command))
        wall, busy, own = (
            now - then for now, then in zip((time.perf_counter(), busy_s(), sum(os.times()[:4])), begin, strict=True)
        )
    stages = [each["stages"] for each in found["sslrun, up to the end of the first step"]]
    row = {
        "benchmark": "startup",
        "config": Path(args.config).stem,
        "commands": {
            name: {clock: quantiles([each[clock] for each in times]) for clock in ("wall_s", "core_s")}
            for name, times in found.items()
        },
        "stages": {
            stage: {clock: quantiles([each[stage][clock] for each in stages]) for clock in ("wall_s", "core_s")}
            for stage in stages[0]
        },
        "other_load": round(max(0.0, (busy - own) / wall), 2),
        "load_average": round(os.getloadavg()[1], 1),
    }
    if not args.dry_run:
        append_row("startup", row)
    for part in ("commands", "stages"):
        for name, times in row[part].items():
            print(f"{name:<42}{times['wall_s']['median']:>7.2f} s {times['core_s']['median']:>7.2f} s of a core")


def timed(command: list[str]) -> dict[str, Any]:
    """Seconds of a command, and the stages that it prints as JSON, if any."""
    begin = time.perf_counter(), sum(os.times()[2:4])
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    times = {"wall_s": time.perf_counter() - begin[0], "core_s": sum(os.times()[2:4]) - begin[1]}
    stages = [json.loads(line)["stages"] for line in out.splitlines() if line.startswith('{"stages"')]
    return {**times, **({"stages": stages[0]} if stages else {})}


def first_step(config_path: str, folder: str) -> None:
    """Run a recipe up to the end of its first step, and print the seconds of each stage as a line of JSON."""
    clock = Stages()
    import torch  # noqa: F401

    clock.end("import of torch")
    from sslrun.config import load

    config = load(config_path, [f"work_dir={folder}"])
    clock.end("reading the recipe")
    from sslrun.runtime import heartbeat
    from sslrun.training import run

    clock.end("import of the engine")

    def watch(place: str) -> None:
        if place == "before the step" and "first batch" in clock.seconds:
            place = "end"
        if place in STAGES and STAGES[place] not in clock.seconds:
            clock.end(STAGES[place])
        if place == "end":
            print(json.dumps({"stages": clock.seconds}), flush=True)
            os._exit(0)

    with heartbeat.watched(watch):
        run(config, None, None, restart=True)


class Stages:
    """Seconds by stage; the first one begins with the process."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}
        started = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        self._last = (started, 0.0)
        self.end("start of Python")

    def end(self, stage: str) -> None:
        """A stage is over."""
        now = (time.clock_gettime(time.CLOCK_BOOTTIME), time.process_time())
        wall_s, core_s = (new - old for new, old in zip(now, self._last, strict=True))
        self.seconds[stage] = {"wall_s": wall_s, "core_s": core_s}
        self._last = now


if __name__ == "__main__":
    main()
