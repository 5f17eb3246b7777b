"""Trains every method on drawn images with several seeds and measures k-NN before and after, for docs/learning.md.

    python benchmarks/learn.py [METHOD ...] [--seeds 3] [--jobs 2]    run what has no row yet; may be interrupted
    python benchmarks/learn.py --table                                write the table and the plot from the rows

The recipes of configs/learn/ train one method each at the scale of the quickstart, with one thread. Runs are in
work_dirs/learn/ and resume where they stopped; each finished run has a row in benchmarks/results/learn.jsonl.

Distillation has the network that SimCLR trained with the same seed as its teacher; that is trained first.

A row also has the linear probe before and after; for methods whose measure is not k-NN, the accuracy after fine-tuning
with a tenth of the labels (learn_finetune.toml) too, from random weights and from the trained network.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "benchmarks")]

from rows import RESULTS, append_row

RECIPES = {path.stem: path for path in sorted((ROOT / "configs/learn").glob("*.toml"))} | {
    "mocov2": ROOT / "configs/quickstart.toml"
}
COLUMNS = 5
DOCUMENT = ROOT / "docs" / "learning.md"
START, END = "<!-- table: benchmarks/learn.py --table -->", "<!-- end of table -->"
PROBED = ("mae", "maskfeat", "simmim")  # by a probe and fine-tuning: they predict pixels or gradients
TEACHERS = {"distillation": "simclr"}
FINETUNE = ROOT / "benchmarks" / "learn_finetune.toml"
PROBED_START = "<!-- table of the probed: benchmarks/learn.py --table -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=list(RECIPES), help="all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    unknown = set(args.methods) - RECIPES.keys()
    if unknown:
        parser.error(f"no such method: {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    if not args.table:
        done = {(row["method"], row["seed"]) for row in rows()}
        todo = [(name, seed) for seed in range(args.seeds) for name in args.methods if (name, seed) not in done]
        with ThreadPoolExecutor(args.jobs) as pool:
            for name, seed, row in pool.map(lambda each: (*each, train(*each)), todo):
                append_row("learn", {"benchmark": "learn", "method": name, "seed": seed, **row})
                print(
                    f"{name}, seed {seed}: k-NN {row['untrained_pct']} -> {row['trained_pct']} % in {row['wall_s']} s"
                )
    write_document()


def train(name: str, seed: int) -> dict[str, Any]:
    """Train (or finish) one run; its row."""
    teacher = []
    if name in TEACHERS:
        teacher = [f"--set=model.teacher_weights={trained(TEACHERS[name], seed)}"]
    run = trained(name, seed, *teacher)
    entries = metrics(run)
    curve = [(entry["epoch"], entry["knn/top1_pct"]) for entry in entries if "knn/top1_pct" in entry]
    probes = [entry["probe/top1_pct"] for entry in entries if "probe/top1_pct" in entry]
    held_out = [{name: value for name, value in entry.items() if name.startswith("val/")} for entry in entries]
    return {
        "untrained_pct": curve[0][1],
        "trained_pct": curve[-1][1],
        "wall_s": round(max(entry["wall_s"] for entry in entries)),
        "knn_curve": curve,
        "probe_pct": [probes[0], probes[-1]],
        **next((each for each in reversed(held_out) if each), {}),
        **(fine_tuned(run) if name in PROBED else {}),
    }


def trained(name: str, seed: int, *words: str) -> Path:
    """The folder of a run, once it is finished."""
    work_dir = ROOT / "work_dirs" / "learn" / f"seed_{seed}"
    sslrun(RECIPES[name], f"--set=seed={seed}", "--resume", f"--work-dir={work_dir}", *words)
    return work_dir / RECIPES[name].stem


def fine_tuned(run: Path) -> dict[str, Any]:
    """Accuracies after fine-tuning, from random weights and from those of a finished run."""
    sslrun("eval", "finetune", run, "--with", FINETUNE)
    (tuned,) = (folder for folder in (run / "eval").iterdir() if folder.is_dir() and folder.name != "scratch")
    scratch = run / "eval" / "scratch.toml"
    scratch.write_text(f'extends = "{tuned.name}/config.toml"\n_delete_ = ["load_from"]\n', encoding="utf-8")
    sslrun(scratch, "--resume", f"--work-dir={scratch.parent}")
    tested = [
        [entry["test/top1_pct"] for entry in metrics(each) if "test/top1_pct" in entry]
        for each in (scratch.with_suffix(""), tuned)
    ]
    last = [accuracies[-1] for accuracies in tested]
    return {"finetuned_10pct_pct": last}


def sslrun(*words: object) -> None:
    """One command with one thread."""
    command = [sys.executable, str(ROOT / "bin/sslrun"), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command[1:])} failed:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def rows() -> Iterator[dict[str, Any]]:
    path = RESULTS / "learn.jsonl"
    if path.exists():
        yield from (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def write_document() -> None:
    """Write the table and the plot of all rows."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows():
        by_method.setdefault(row["method"], []).append(row)
    lines = ["| method | seeds | untrained, % | trained, % | gain, points | least gain |", "|---|---|---|---|---|---|"]
    for name, runs in sorted(by_method.items()):
        gains = [run["trained_pct"] - run["untrained_pct"] for run in runs]
        before, after = ([run[key] for run in runs] for key in ("untrained_pct", "trained_pct"))
        lines.append(
            f"| {name} | {len(runs)} | {_spread(before)} | {_spread(after)} | {_spread(gains)} | {min(gains):.1f} |"
        )
    text = _with_table(DOCUMENT.read_text(encoding="utf-8"), START, lines)
    lines = ["| method | seeds | probe untrained, % | probe trained, % | fine-tuned from random weights, % | "
             "fine-tuned, % |", "|---|---|---|---|---|---|"]  # fmt: skip
    for name in PROBED:
        if runs := [run for run in by_method.get(name, ()) if "finetuned_10pct_pct" in run]:
            pairs = [
                [run[key][side] for run in runs] for key in ("probe_pct", "finetuned_10pct_pct") for side in (0, 1)
            ]
            lines.append(f"| {name} | {len(runs)} | " + " | ".join(map(_spread, pairs)) + " |")
    DOCUMENT.write_text(_with_table(text, PROBED_START, lines), encoding="utf-8")
    _plot(by_method)


def _with_table(text: str, start: str, lines: list[str]) -> str:
    """The text with other lines between two marks."""
    head, _, rest = text.partition(start)
    return f"{head}{start}\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}"


def _spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} +- {deviation:.1f}"


def _plot(by_method: dict[str, list[dict[str, Any]]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "learn"  # the same image for the same rows
    import matplotlib.pyplot as plt

    lines = -(-len(by_method) // COLUMNS)
    figure, axes = plt.subplots(
        lines, COLUMNS, figsize=(9, 1.9 * lines), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for panel in axes.flat[len(by_method) :]:
        panel.set_axis_off()
    for panel, (name, runs) in zip(axes.flat, sorted(by_method.items()), strict=False):
        for run in runs:
            panel.plot(*zip(*run["knn_curve"], strict=True), color="tab:blue", alpha=0.7)
        panel.set_title(name, fontsize="medium")
        panel.grid(alpha=0.3)
    figure.supxlabel("epoch")
    figure.supylabel("k-NN accuracy, %")
    figure.savefig(DOCUMENT.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
