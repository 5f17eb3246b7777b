"""How far each transform of each mode is from PIL, beside what it costs: the table of docs/fidelity.md.

    python benchmarks/fidelity.py

Errors are those of the test table (tests/fidelity_cases.py), on more views. Costs are milliseconds of one core for each
view, on the CPU, medians of interleaved rounds; those of the dali mode leave out the decoding, and say nothing about a
GPU.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import numpy as np
import torch
from PIL import Image
from rows import append_row

from fidelity_cases import CASES, Bound, Case, decoded, measure
from sslrun.data import pil_twins
from sslrun.data.exact import ExactStage
from sslrun.data.graph import Arguments, dali_views, graph_arguments, graph_plan, view_arguments
from sslrun.data.views import ViewGroup

DOCUMENT = ROOT / "docs" / "fidelity.md"
START, END = "<!-- table: benchmarks/fidelity.py -->", "<!-- end of table -->"
VIEWS, ROUNDS = 8, 7


def main() -> None:
    torch.set_num_threads(1)
    table = [
        "| transform | exact: mean / p99 / max | bound | core-ms, C | core-ms, torch "
        "| dali: mean / p99 / max | bound | core-ms | PIL core-ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        (exact, worst_exact), (dali, worst_dali) = (measure(case, mode, VIEWS) for mode in ("exact", "dali"))
        cost = costs(case)
        row = {"benchmark": "fidelity", "case": case.name, "exact": vars(exact), "dali": vars(dali), "core_ms": cost}
        append_row("fidelity", {**row, "worst_view_exact": worst_exact, "worst_view_dali": worst_dali})
        table.append(
            f"| {case.name} | {measured(exact)} | {case.exact} | {cost['C']:.2f} | {cost['torch']:.2f} "
            f"| {measured(dali)} | {case.dali} | {cost['dali']:.2f} | {cost['PIL']:.2f} |"
        )
        print(table[-1], flush=True)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    DOCUMENT.write_text("\n".join([before, *table, after]), encoding="utf-8")


def measured(error: Bound) -> str:
    return f"{error.mean:.4f} / {error.p99} / {error.most}"


def costs(case: Case) -> dict[str, float]:
    """Milliseconds of one core for each view, of images of 500 x 375 pixels."""
    images = [np.asarray(Image.fromarray(pixels).resize((500, 375))) for pixels in decoded()]
    groups = [ViewGroup(VIEWS // 2, case.transforms())]
    sizes = np.tile((375, 500), (len(images), 1))
    arguments = view_arguments(groups, 0, 0, np.arange(len(images)), sizes)
    tensors = [torch.from_numpy(pixels.copy()) for pixels in images]
    compiled, plain = (ExactStage(groups, torch.device("cpu"), compiled=c) for c in (True, False))
    sides: dict[str, Callable[[], object]] = {
        "C": lambda: compiled([tensors], arguments),
        "torch": lambda: plain([tensors], arguments),
        "PIL": lambda: pil_twins.views(images, groups, arguments),
        "dali": graph(images, groups, arguments),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    for side in sides.values():
        side()
    for _ in range(ROUNDS):
        for name, side in sides.items():
            start = time.process_time()
            side()
            times[name].append(1e3 * (time.process_time() - start) / (len(images) * groups[0].num_views))
    return {side: round(statistics.median(values), 3) for side, values in times.items()}


def graph(images: list[np.ndarray], groups: list[ViewGroup], arguments: Arguments) -> Callable[[], object]:
    """One run of the views as a DALI graph, one thread, from images in memory."""
    from nvidia.dali import fn, pipeline_def

    plan = graph_plan(groups, [len(group.steps) for group in groups])
    values = graph_arguments(plan, arguments)

    def views() -> tuple:
        image = fn.external_source(source=lambda: images, layout="HWC", batch=True)
        return tuple(dali_views(image, plan, lambda: values))

    options = {"num_threads": 1, "device_id": None, "exec_dynamic": True, "prefetch_queue_depth": 1}
    pipeline = pipeline_def(enable_conditionals=True)(views)(batch_size=len(images), **options)
    pipeline.build()
    return pipeline.run


if __name__ == "__main__":
    main()
