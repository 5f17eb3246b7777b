"""Counts what optimizer steps do on a GPU, without one: launches, bytes, FLOP, peak memory, the least time.

    python benchmarks/rehearsal.py                count all cases, in their short and their full form
    python benchmarks/rehearsal.py mocov2 ...     only these
    python benchmarks/rehearsal.py --table        write the table of docs/gpu.md from the rows, or print it

Rows replace those of the same case and form in results/rehearsal.jsonl: the counts depend on the code alone. The tests
compare with them, so that a change which doubles the launches of a step is seen.
"""

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("engine", "kernels", "tests")]

from rehearsal.cases import CASES
from rehearsal.processes import compiled, run

ROWS = ROOT / "benchmarks/results/rehearsal.jsonl"
DOCUMENT = ROOT / "docs/gpu.md"
START, END = "<!-- table: rehearsed, by benchmarks/rehearsal.py --table -->", "<!-- end of table: rehearsed -->"
FORMS = ("short", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--processes", type=int, default=2, help="number of processes at a time")
    args = parser.parse_args()
    if not args.table:
        rows = {(row["case"], row["size"]): row for row in read_rows()}
        names, count = args.cases or list(CASES), args.processes
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(count) as pool:
            library = compiled(Path(folder))
            jobs = [(names[part::count], form) for form in FORMS for part in range(min(count, len(names)))]
            for found in pool.map(lambda job: counted(library, *job), jobs):
                rows |= {(row["case"], row["size"]): row for row in found}
                order = [(name, form) for form in FORMS for name in CASES]
                ROWS.write_text("".join(f"{json.dumps(rows[key])}\n" for key in order if key in rows), encoding="utf-8")
    lines = table([row for row in read_rows() if row["size"] == "full"])
    text = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    if START in text:
        before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
        DOCUMENT.write_text("\n".join([before, *lines, after]), encoding="utf-8")
    else:
        print(*lines, sep="\n")


def read_rows() -> list[dict[str, Any]]:
    """The committed rows."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []


def counted(library: Path, names: list[str], form: str) -> list[dict[str, Any]]:
    """Rows of some cases in one form."""
    options = ["--full"] if form == "full" else []
    return [row_of(found, form) for found in run(library, "rehearsal.step", *names, *options, timeout_s=7200)]


def row_of(found: dict[str, Any], form: str) -> dict[str, Any]:
    """The row of a line of `rehearsal.step`."""
    assert "error" not in found, f"{found['case']}: {found['error']}"
    plan = found["plan"]
    return {
        "case": found["case"],
        "size": form,
        "global_batch": plan["global_batch"],
        "ranks": plan["world_size"],
        "accumulation": plan["accumulation"],
        "micro_batch": plan["machine"]["micro_batch"],
        "precision": plan["machine"]["precision"],
        "launches": found["launches"],
        "roofline_ms": round(1e3 * found["roofline_s"], 1),
        "tflop": round(found["flops"] / 1e12, 2),
        "gbytes": round(found["bytes"] / 1e9, 1),
        "peak_gib": round(found["peak_bytes"] / 2**30, 2),
        "expected_gib": round(found["expected_bytes"] / 2**30, 2),
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table of the steps of one rank."""
    lines = [
        "| step of one rank | samples | launches | TFLOP | GB moved | at least, ms | peak GiB | by `--dry-run` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = f"{row['accumulation']} x {row['micro_batch']}" if row["accumulation"] > 1 else row["micro_batch"]
        lines.append(
            f"| {row['case']} | {parts} | {row['launches']:,} | {row['tflop']:.1f} | {row['gbytes']:.0f} | "
            f"{row['roofline_ms']:.0f} | {row['peak_gib']:.1f} | {row['expected_gib']:.1f} |"
        )
    return lines


if __name__ == "__main__":
    main()
