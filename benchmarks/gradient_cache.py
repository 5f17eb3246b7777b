"""Compares an optimizer step on a whole batch with the same step in parts, with and without the gradient cache.

    python benchmarks/gradient_cache.py [METHOD ...] [--batch 256] [--rounds 7]
    python benchmarks/gradient_cache.py --table      write the table of docs/configs.md from the rows

The methods are those whose loss compares the samples of a batch, with the networks and images of configs/learn and
BatchNorm groups of an eighth of the batch, so that all forms but "parts alone" compute the same. Rounds alternate.
Memory is what a process of its own takes during its first three steps, beyond what it holds before them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from engine_step import EngineStep, engine_step, timed
from rows import RESULTS, append_row, quantiles

from sslrun.config import load

METHODS = ("simclr", "barlowtwins", "swav", "vicreg")
PARTS = 8  # BatchNorm groups
# By name: number of micro-batches, and whether the gradient cache is on.
FORMS = {"whole": (1, True), "cached in 2": (2, True), "cached in 8": (8, True), "parts alone, 8": (8, False)}
DOCUMENT = ROOT / "docs/configs.md"
START, END = "<!-- table: gradient cache, by benchmarks/gradient_cache.py -->", "<!-- end of table: gradient cache -->"
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=list(METHODS), help="all by default")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each form; at least two")
    parser.add_argument("--only", nargs=2, metavar=("METHOD", "FORM"), help="print the memory of one form, in MiB")
    parser.add_argument("--table", action="store_true", help="only write the table")
    args = parser.parse_args()
    if args.only:
        step = made(args.only[0], args.only[1], args.batch)
        Path("/proc/self/clear_refs").write_text("5")  # the most so far becomes what is held now
        before = resident_mib("VmRSS")
        timed(step, 3, CPU)
        print(resident_mib("VmHWM") - before)
        return
    for method in () if args.table else args.methods:
        append_row("gradient_cache", measured(method, args.batch, args.rounds))
    write_table()


def made(method: str, form: str, batch: int) -> EngineStep:
    """A step of a method's recipe in one of the forms."""
    parts, is_cached = FORMS[form]
    settings = {
        "global_batch": batch,
        "data.samples_per_gpu": batch // PARTS,
        "engine.micro_batch": batch // parts,
        "engine.gradient_cache": str(is_cached).lower(),
        "engine.device": "cpu",
        "model.neck.norm_cfg": '{type="BN"}',
    }
    config = load(str(ROOT / f"configs/learn/{method}.toml"), [f"{key}={value}" for key, value in settings.items()])
    return engine_step(config, CPU)


def measured(method: str, batch: int, rounds: int) -> dict[str, object]:
    """Seconds and memory of all forms of a method's step."""
    steps = {form: made(method, form, batch) for form in FORMS}
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for step in steps.values():
        timed(step, 1, CPU)
    for round_number in range(rounds):
        for form in sorted(FORMS, reverse=round_number % 2 == 0):
            times[form].append(timed(steps[form], 1, CPU))
    ratios = {form: quantiles([a / b for a, b in zip(times[form], times["whole"], strict=True)]) for form in FORMS}
    return {
        "benchmark": "gradient_cache",
        "config": f"learn/{method}",
        "batch": batch,
        "threads": torch.get_num_threads(),
        "ms": {form: quantiles([1e3 * seconds for seconds in times[form]]) for form in FORMS},
        "over_whole": ratios,
        "step_mib": {form: round(alone(method, form, batch), 1) for form in FORMS},
    }


def alone(method: str, form: str, batch: int) -> float:
    """Memory of a form, MiB, measured in a process of its own."""
    command = [sys.executable, __file__, "--batch", str(batch), "--only", method, form]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def resident_mib(name: str) -> float:
    """A figure of /proc/self/status: "VmRSS", what the process holds now, or "VmHWM", the most so far."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def write_table() -> None:
    """Writes the table of the newest row of each method."""
    rows = [json.loads(line) for line in (RESULTS / "gradient_cache.jsonl").read_text(encoding="utf-8").splitlines()]
    newest = {row["config"]: row for row in rows}
    head = "| recipe | form | memory of a step, MiB | of the whole | time, ms | times the whole |"
    lines = ["", head, "|---|---|---|---|---|---|"]
    for config, row in newest.items():
        for form in FORMS:
            memory, whole = row["step_mib"][form], row["step_mib"]["whole"]
            cells = (
                config, form, f"{memory:,.0f}", f"{memory / whole:.2f}",
                f"{row['ms'][form]['median']:,.0f}", f"{row['over_whole'][form]['median']:.2f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    DOCUMENT.write_text("\n".join([before, *lines, "", after]), encoding="utf-8")


if __name__ == "__main__":
    main()
