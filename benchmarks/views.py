"""Counts what finishing a batch of views asks of a GPU, and times what it takes the host, on any machine.

    python benchmarks/views.py [CONFIG ...] [--batch 256 32] [--rounds 200]
    python benchmarks/views.py --table      write the table of docs/kernels.md from the rows

After DALI's crops and flips the rest is `sslkernels.write_views`, or torch forms one after the other. Both are run on
meta tensors, which compute nothing: `launches` and `operators` are the kernels that a GPU would be given, `gb` the
bytes of the tensors that each of them reads and writes. `host_ms` is the thread's processor time from the numbers of
the transforms to the buffers that are copied to the device, without the launches; recipes and batch sizes take turns.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import numpy as np
import torch
from rows import RESULTS, append_row, quantiles
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from sslkernels import views
from sslrun.config import load
from sslrun.data import exact, split
from sslrun.data.exact import ExactStage
from sslrun.data.graph import Arguments, view_arguments
from sslrun.data.operations import Program
from sslrun.data.split import num_dali_steps
from sslrun.data.views import ViewGroup
from sslrun.session import build

RECIPES = ["configs/mocov2.toml", "configs/byol.toml", "configs/swav.toml"]
META, CUDA = torch.device("meta"), torch.device("cuda")
DOCUMENT = ROOT / "docs" / "kernels.md"
START, END = "<!-- table: benchmarks/views.py --table -->", "<!-- end of table: benchmarks/views.py -->"


class Operators(TorchDispatchMode):
    """Counts the operators that compute or move something, and the bytes of their tensors on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        leaves = torch.utils._pytree.tree_leaves
        read, written = (
            {id(x): x.nbytes for x in leaves(values) if isinstance(x, Tensor) and x.device == META}
            for values in ((args, kwargs), result)
        )
        if written and not is_view and "empty" not in function.__name__:
            self.count += 1
            self.bytes += sum(read.values()) + sum(written.values())
        return result


def crops_of(groups: list[ViewGroup], batch: int) -> list[list[Tensor]]:
    """What DALI hands over: for each group a tensor for each view."""
    return [
        [torch.empty((batch, *group.size, 3), dtype=torch.uint8, device=META) for _ in range(group.num_views)]
        for group in groups
    ]


def by_torch(groups: list[ViewGroup], arguments: Arguments, batch: int, done: list[int]) -> dict[str, float]:
    stage = ExactStage(groups, META, dali_steps=done, compiled=False, dtype=torch.bfloat16)
    with Operators() as operators:
        stage(crops_of(groups, batch), arguments)
    return {"operators": operators.count, "gb": round(operators.bytes / 1e9, 3)}


def by_kernels(groups: list[ViewGroup], arguments: Arguments, batch: int, done: list[int]) -> dict[str, float]:
    launched: list[str] = []
    moved: list[float] = []
    write = views.write_views

    def counted(out: Tensor, crops: list[Tensor], table: views.Table) -> None:
        moved.append(views.bytes_moved(out, table))
        write(out, crops, table)

    with (
        mock.patch.object(JITFunction, "run", lambda kernel, *args, **options: launched.append(kernel.__name__)),
        mock.patch.object(split, "compiled_code", lambda device: "Triton"),
        mock.patch.object(views, "write_views", counted),
    ):
        stage = ExactStage(groups, META, dali_steps=done, dtype=torch.bfloat16)
        stage(crops_of(groups, batch), arguments)
    return {"launches": len(launched), "gb": round(sum(moved) / 1e9, 3)}


def preparation(groups: list[ViewGroup], arguments: Arguments, batch: int, done: list[int]) -> Callable[[], None]:
    """From numbers to buffers, as for a GPU."""
    outs = [torch.empty((batch * g.num_views, 1, 1, 3), dtype=torch.uint8).permute(0, 3, 1, 2) for g in groups]
    crops = [[torch.empty((batch, 1, 1, 3), dtype=torch.uint8)] * group.num_views for group in groups]

    def prepare() -> None:
        for group, own, first, out, given in zip(groups, arguments, done, outs, crops, strict=True):
            remaining = exact._RemainingSteps(group, own, first, "Triton")
            for program in remaining.runs:
                assert isinstance(program, Program)
                table = exact.table_of(program, remaining.scales)
                views._check_codes(table.codes)
                views._tables(out, given, table)

    return prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=RECIPES, help="recipes")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 32], help="images in a batch")
    parser.add_argument("--rounds", type=int, default=200, help="timings of each case")
    parser.add_argument("--table", action="store_true", help="only write the table of docs/kernels.md")
    args = parser.parse_args()
    if args.table:
        write_table()
        return
    torch.set_num_threads(1)
    cases, rows = [], []
    for name in args.configs:
        groups = build(load(str(name))).data.views
        done = [num_dali_steps(group, "exact", CUDA) for group in groups]
        for batch in args.batch:
            arguments = view_arguments(groups, 0, 0, np.arange(batch), np.full((batch, 2), 400))
            given = (groups, arguments, batch, done)
            cases.append((preparation(*given), []))
            num_views = batch * sum(group.num_views for group in groups)
            counts = {"kernels": by_kernels(*given), "torch": by_torch(*given)}
            rows.append({"benchmark": "views", "recipe": Path(name).stem, "batch": batch, "views": num_views, **counts})
    for _ in range(args.rounds):
        for prepare, seconds in cases:
            begin = time.thread_time()
            prepare()
            seconds.append(time.thread_time() - begin)
    for row, (_, seconds) in zip(rows, cases, strict=True):
        row["host_ms"] = quantiles([1e3 * second for second in seconds])
        append_row("views", row)
        print(row)


def write_table() -> None:
    """The last row of each recipe and batch size."""
    last = {}
    for line in (RESULTS / "views.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        last[row["recipe"], row["batch"]] = row
    lines = [
        "| recipe | images, views | launches | GB | torch: operators | GB | host ms: median (quartiles) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in last.values():
        kernels, plain, host = row["kernels"], row["torch"], row["host_ms"]
        cells = [
            *(row["recipe"], f"{row['batch']}, {row['views']:,}", kernels["launches"], f"{kernels['gb']:.2f}"),
            *(f"{plain['operators']:,}", f"{plain['gb']:.1f}"),
            f"{host['median']:.2f} ({host['p25']:.2f}-{host['p75']:.2f})",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    DOCUMENT.write_text("\n".join([before, *lines, after]), encoding="utf-8")


if __name__ == "__main__":
    main()
