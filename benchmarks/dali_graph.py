"""What the graph of the dali mode costs beside its pixels: its operators, and the executor's time for them.

    python benchmarks/dali_graph.py [--batches 60]

Counts are those of a graph for a GPU, which is built but not run. The time is that of a batch of 32 on the CPU with
views of 16 pixels, one thread, decoding left out: what remains when pixels cost next to nothing. The rows become a
table of docs/fidelity.md.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import numpy as np
from rows import append_row, quantiles

from fidelity_cases import operators
from sslrun.config import load
from sslrun.data.graph import dali_views, graph_arguments, graph_plan, num_inputs, view_arguments
from sslrun.data.views import ViewGroup

DOCUMENT = ROOT / "docs" / "fidelity.md"
START, END = "<!-- table: benchmarks/dali_graph.py -->", "<!-- end of the graphs -->"
RECIPES = ("mocov2", "simclr", "byol", "mocov3", "swav", "deepcluster", "relative_loc", "rotation_pred")
TIMED = {"mocov2": 1, "swav": 2}  # with their numbers of view groups
BATCH, SIZE = 32, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=60, help="number of timed batches")
    batches = parser.parse_args().batches
    table = [
        "| recipe | views | operators | of these on a GPU | arrays for each batch | core-ms for a batch of 32 |",
        "|---|---|---|---|---|---|",
    ]
    for name in RECIPES:
        path = ROOT / "configs" / f"{name}.toml"
        groups = load(path).build(list[ViewGroup], "data.views")
        found = operators(groups, device_id=0)
        row: dict[str, Any] = {
            "benchmark": "dali_graph",
            "recipe": name,
            "views": sum(group.num_views for group in groups),
            "operators": len(found),
            "operators_on_gpu": sum(operator._op.device == "gpu" for operator in found),
            "arrays_per_batch": num_inputs(graph_plan(groups, [len(group.steps) for group in groups])),
        }
        if name in TIMED:
            small = [f"data.views.{place}.transforms.0.size={SIZE}" for place in range(TIMED[name])]
            wall, core = times(load(path, small).build(list[ViewGroup], "data.views"), batches)
            row |= {"batch": BATCH, "size": SIZE, "wall_ms": quantiles(wall), "core_ms": quantiles(core)}
        append_row("dali_graph", row)
        time_ms = f"{row['core_ms']['median']:.1f}" if name in TIMED else ""
        counts = " | ".join(str(row[key]) for key in ("views", "operators", "operators_on_gpu", "arrays_per_batch"))
        table.append(f"| {name} | {counts} | {time_ms} |")
        print(table[-1], flush=True)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    DOCUMENT.write_text("\n".join([before, *table, after]), encoding="utf-8")


def times(groups: list[ViewGroup], batches: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each batch, by the clock and of the processor."""
    from nvidia.dali import fn, pipeline_def

    images = [np.zeros((SIZE, SIZE, 3), dtype=np.uint8)] * BATCH
    arguments = view_arguments(groups, 0, 0, np.arange(BATCH), np.full((BATCH, 2), SIZE))
    plan = graph_plan(groups, [len(group.steps) for group in groups])
    given = graph_arguments(plan, arguments)

    def views() -> Any:
        decoded = fn.external_source(source=lambda: images, batch=True, layout="HWC")
        return tuple(dali_views(decoded, plan, lambda: given))

    options = {"num_threads": 1, "device_id": None, "exec_dynamic": True, "prefetch_queue_depth": 1}
    pipeline = pipeline_def(enable_conditionals=True)(views)(batch_size=BATCH, **options)
    pipeline.build()
    wall, core = [], []
    for _ in range(batches + 1):
        start = time.perf_counter(), time.process_time()
        pipeline.run()
        wall.append(1e3 * (time.perf_counter() - start[0]))
        core.append(1e3 * (time.process_time() - start[1]))
    return wall[1:], core[1:]


if __name__ == "__main__":
    main()
