"""The tables of first_light.py, on its console and in docs/gpu.md, from its rows.

docs/gpu.md also has a table of the steps that were compiled for an H100 without one (tests/rehearsal/test_inductor.py).
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "results" / "first_light.jsonl"
COMPILED = ROOT / "benchmarks" / "results" / "compiled_step.json"
DOCUMENT = ROOT / "docs" / "gpu.md"
NONE_YET = "No GPU has run it yet."

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: a table of the steps, of the kernels, of everything else, and what failed."""
    done = [row for row in rows if row["status"] == "done"]
    sections = [_versions(done), _steps(done), _kernels(done), _others(done), _troubles(rows)]
    return [line for section in sections if section for line in (*section, "")][:-1]


def _versions(rows: Sequence[Row]) -> list[str]:
    return [f"{row['date']}, commit {_commit(row)}: {row['summary']}" for row in rows if row["part"] == "versions"]


def _commit(row: Row) -> str:
    about = row.get("environment", {})
    return f"{(about.get('commit') or 'unknown')[:9]}{' and changes' if about.get('dirty') else ''}"


def _steps(rows: Sequence[Row]) -> list[str]:
    """A line for each measured training step."""
    lines = []
    for row in rows:
        if "images_per_s" in row:
            at_once = "" if row["micro_batch"] == row["global_batch"] else f" in {row['micro_batch']}s"
            expected = f" ({row['expected_gib']:.1f})" if "expected_gib" in row else ""
            cells = [
                row["recipe"].split("_")[0] if row["part"] != "vit" else "mocov3 ViT-S/16",
                row["mode"],
                f"{row['global_batch']}{at_once}",
                f"{row['ms']['median']:.1f}",
                f"{row['host_ms']:.1f}" if "host_ms" in row else "-",
                f"{row['images_per_s']:,.0f}",
                f"{row['peak_gib']:.1f}{expected}" if "peak_gib" in row else "-",
                str(row.get("host_waits", "-")),
                f"{100 * row['of_matmul']:.0f} %",
                f"{row['first_step_s']:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    heads = ["step", "mode", "batch", "ms", "host ms", "images/s", "peak GiB (expected)", "waits"]
    heads += ["of matmul rate", "first step, s"]
    return _with_head(heads, lines)


def _kernels(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["part"] == "kernels":
            eager = row["over_kernel"].get("eager")
            own, others = row["peak_mib"]["kernel"], row["peak_mib"].get("eager")
            cells = [
                f"{row['operation']}, {row['shape']}, {row['dtype']}",
                f"{row['ms']['kernel']['median']:.3g}",
                f"{eager['median']:.2f}" if eager else "-",
                f"{own:.1f}" + (f", {100 * own / others:.0f} %" if others else ""),
                f"{100 * row['of_ceiling']['median']:.0f} % {next(iter(row['work']))}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return _with_head(["kernel", "ms", "eager / kernel", "MiB, of eager", "of ceiling"], lines)


def _others(rows: Sequence[Row]) -> list[str]:
    listed = [row for row in rows if "images_per_s" not in row and row["part"] not in ("versions", "kernels")]
    lines = [f"| {row['part'].replace('_', ' ')} | {row['item']} | {row['summary']} |" for row in listed]
    return _with_head(["part", "item", "result"], lines)


def _troubles(rows: Sequence[Row]) -> list[str]:
    """What failed and what was skipped, a line each; equal reasons of one part share one."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "done":
            why = row.get("error") or row.get("reason") or ""
            lines.setdefault((row["status"], row["part"], why), []).append(row["item"])
    return [
        f"- {status}: {part.replace('_', ' ')}, {', '.join(items)}: {why}"
        for (status, part, why), items in lines.items()
    ]


def _with_head(heads: Sequence[str], lines: list[str]) -> list[str]:
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *lines] if lines else []


def write_tables() -> None:
    """Rewrite the tables of docs/gpu.md: the last run on each GPU, and the compiled steps."""
    last: dict[str, list[Row]] = {}
    for gpu, rows in _runs():
        last[gpu] = rows
    lines = [line for gpu, rows in sorted(last.items()) for line in (f"### {gpu}", "", *table(rows), "")]
    _replace("first light", lines or [NONE_YET, ""])
    if COMPILED.exists():
        _replace("compiled", [*_compiled(json.loads(COMPILED.read_text(encoding="utf-8"))["steps"]), ""])


def _replace(name: str, lines: Sequence[str]) -> None:
    start, end = markers(name)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text[: text.index(start) + len(start)], text[text.index(end) :]
    DOCUMENT.write_text("\n".join([before, "", *lines, after]), encoding="utf-8")


def markers(name: str) -> tuple[str, str]:
    """The lines of docs/gpu.md around a table."""
    return f"<!-- table: {name}, by benchmarks/first_light.py --table -->", f"<!-- end of table: {name} -->"


def _compiled(steps: Sequence[Row]) -> list[str]:
    """A line for each step, and below it one for each of its graphs."""
    lines = []
    for step in steps:
        name = step["recipe"].rpartition("/")[2].partition("_8xb")[0].partition("_16xb")[0]
        settings = f" ({', '.join(step['settings'])})" if step["settings"] else ""
        whole = [
            f"**{name}**{settings}, {step['micro_batch']} samples",
            step["launches"],
            step["library_calls"],
            step["gb"],
        ]
        parts = [
            [f"{graph['child']}, {graph['phase']}" + (f" x {graph['runs']}" if graph["runs"] > 1 else "")]
            + [graph[key] * graph["runs"] for key in ("launches", "library_calls", "gb")]
            for graph in step["graphs"]
        ]
        lines += [f"| {what} | {launches:,} | {calls:,} | {gb:.1f} |" for what, launches, calls, gb in [whole, *parts]]
    return _with_head(["step, graph", "launches", "of them library calls", "GB moved"], lines)


def _runs() -> Iterator[tuple[str, list[Row]]]:
    """The GPU and the rows of each run, in their order."""
    runs: dict[str, list[Row]] = {}
    for line in ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []:
        row = json.loads(line)
        runs.setdefault(row["run"], []).append(row)
    for rows in runs.values():
        gpus = next((row["environment"]["gpus"] for row in rows if "environment" in row), [])
        if gpus:
            yield gpus[0], rows
