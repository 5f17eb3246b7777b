"""Writes docs/performance.md and its plots from the rows in benchmarks/results/.

    python benchmarks/performance_page.py

The page is a function of the rows alone: of the newest one of each measurement. A test compares.
"""

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks/results", ROOT / "docs"
BENCHMARKS = ("loader", "step", "scale", "many_files", "startup", "kernels", "rehearsal")

Row = dict[str, Any]
Rows = dict[str, list[Row]]
Figures = dict[str, float]  # quantiles

NO_ROWS = "Not measured yet: no rows."
QUIET = 0.5  # cores that other work may keep busy where the first table shows times by the clock
QUIET_LOAD = 1  # load average, in the same sense
GOAL_PCT = 3  # over the bare loop

LOADERS = {  # sides of loader.py, in the order of the page
    "exact": "sslrun",
    "pil": "PIL in a DataLoader, one decode for all views",
    "lightly": "lightly's transforms in a DataLoader",
    "litdata": "LitData, with lightly's transforms",
    "kornia": "PIL and kornia in a DataLoader",
    "decode": "DALI, decoding alone",
    "simplejpeg": "simplejpeg, decoding alone, one thread",
    "dali": "sslrun, all in DALI",
}
INSTEAD = ("lightly", "pil", "kornia")  # what the first table names
PLACES = {  # parts of a step
    "targets": "keys: momentum encoder, forward",
    "forward": "encoder and loss, forward",
    "backward": "backward",
    "update": "optimizer, norm of the gradient",
    "momentum": "momentum update, queue",
    "logging": "metrics",
    "before the step": "between steps: schedules",
}
STEPS = {"bare": "bare loop", "engine": "sslrun", "lightly": "lightly's MoCo"}
AXES = {
    "views": "Views of each image",
    "keys": "Keys in MoCo's queue",
    "prototypes": "SwAV's prototypes",
    "ranks": "Ranks, over gloo, on this machine's cores",
}


def main() -> None:
    for name, text in pages(read_rows()).items():
        path = DOCS / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


def read_rows(folder: Path = RESULTS) -> Rows:
    """The rows of the benchmarks that the page shows, oldest first."""
    files = {name: folder / f"{name}.jsonl" for name in BENCHMARKS}
    return {
        name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        for name, path in files.items()
    }


def pages(rows: Rows) -> dict[str, str]:
    """The files that the rows give, by their paths in docs/."""
    loader = newest([row for row in rows["loader"] if "sides" in row and "read_ms" not in row], "recipe")
    step = newest([row for row in rows["step"] if "sides" in row], "config")
    operators = newest([row for row in rows["step"] if "operators" in row], "config")
    scale = {row["axis"]: row for row in newest(rows["scale"], "axis")}
    files = newest([row for row in rows["many_files"] if "ranks" in row and row["engine"] == "after"], "count")
    startup = newest(rows["startup"], "config")
    kernels = newest([row for row in rows["kernels"] if row["device"].startswith("CPU")], "operation", "shape")
    memory = [row for row in rows["rehearsal"] if row["size"] == "full"]
    loader_plots = {f"performance/{name}.svg": text for name, text in plots_of(loader)}
    scale_plots = {"performance/scale.svg": scale_plot(scale)} if scale.keys() & AXES.keys() else {}
    sections = [
        *first_screen(loader, step, startup, kernels),
        *loader_section(loader, list(loader_plots)),
        *step_section(step, operators),
        *scale_section(scale, list(scale_plots)),
        *files_section(sorted(files, key=lambda row: row["count"])),
        *memory_section(memory, scale, kernels),
        *startup_section(startup),
        *how(loader, step),
    ]
    return {"performance.md": "\n".join(sections) + "\n", **loader_plots, **scale_plots}


def newest(rows: Iterable[Row], *keys: str) -> list[Row]:
    """The newest row of each value of the keys, in the order in which the values first occur."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        found[tuple(row[key] for key in keys)] = row
    return list(found.values())


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def first_screen(loader: list[Row], step: list[Row], startup: list[Row], kernels: list[Row]) -> list[str]:
    """Title, and a table of what a user would pick instead."""
    lines = []
    for row in loader:
        for side in INSTEAD:
            if side in row["sides"]:
                ratio = row["over_exact"][side]
                cells = (f"images of `{short(row['recipe'])}`, {row['views']}", LOADERS[side])
                lines.append([*cells, times(ratio["core"]), if_quiet(row, times(ratio["wall"])), load(row)])
    for row in step:
        for side, name in STEPS.items():
            if side != "engine" and side in row["sides"]:
                own, other = row["sides"]["engine"], row["sides"][side]
                core, wall = (other[clock]["median"] / own[clock]["median"] for clock in ("core_ms", "ms"))
                what = f"a training step of `{short(row['config'])}`, {row['batch']} images"
                lines.append([what, name, f"**{core:.2f}**", if_quiet(row, f"{wall:.2f}"), load(row)])
    for row in kernels:
        if (row["operation"], row["shape"]) in LOSSES:
            ratio = row["over_kernel"]["eager"]
            lines.append(
                [
                    f"{LOSSES[row['operation'], row['shape']]}, {row['shape']}",
                    "eager PyTorch",
                    "",
                    if_quiet(row, times(ratio)),
                    load(row),
                ]
            )
    losses = [row for row in kernels if (row["operation"], row["shape"]) in LOSSES]
    places = [row["environment"] for row in [*loader, *step, *losses]]
    machines = sorted({f"{place['cores']} cores of an {place['cpu']}" for place in places})
    return [
        "# Performance",
        "",
        "How many times as long the other one takes for the same work, measured side by side in one run, on "
        f"{' and '.join(machines) or 'CPUs'}. Above 1, sslrun is faster. Ratios of processor time depend little on "
        "what else runs; those by the clock do, and are left out here where other work kept more than half a core "
        "busy (*other load*, in cores). "
        "Medians, with quartiles in brackets. **Nothing has been measured on a GPU yet** ([gpu.md](gpu.md)).",
        "",
        *table(["what", "instead of sslrun", "processor time", "by the clock", "other load"], lines),
        "",
        *([f"`sslrun --help` takes {start_of(startup)} of a core. " + contents()] if startup else [contents()]),
        "",
    ]


LOSSES = {("info_nce", "B 256, D 128, K 65,536"): "MoCo's loss and gradient"}


def contents() -> str:
    return (
        "[Loading](#loading), [the step](#the-step), [scale](#scale), [memory](#memory), [start](#start), [how it "
        "is measured](#how-it-is-measured); single operations are in [kernels.md](kernels.md)."
    )


def start_of(startup: list[Row]) -> str:
    return f"{startup[-1]['commands']['sslrun --help']['core_s']['median']:.2f} s"


def loader_section(loader: list[Row], plots: Sequence[str]) -> list[str]:
    """Images per second, cores and bytes of each side."""
    lines = ["## Loading", "", *([] if loader else [NO_ROWS, ""])]
    for plot in plots:
        lines += [f"![Processor time per image]({plot})", ""]
    for row in loader:
        body = []
        for side, name in LOADERS.items():
            if side in row["sides"]:
                each = row["sides"][side]
                made = "" if side in ("decode", "simplejpeg") else f"{each['made_mb_per_s']:,.0f}"
                cells = [
                    name,
                    spread(each["core_ms"]),
                    spread(each["images_per_s"], 0),
                    f"{each['cores']['median']:.2f}",
                ]
                body.append([*cells, f"{each['read_mb_per_s']:,.0f}", made])
        head = ["", "ms of a core per image", "images/s", "busy cores", "read, MB/s", "made, MB/s"]
        missing = "".join(f" {LOADERS[side]} is missing: {why}." for side, why in row.get("left_out", {}).items())
        lines += [
            f"**`{short(row['recipe'])}`, {row['views']}.** {row['images']}; batches of {row['batch']}; threads or "
            f"workers: {row['threads']}; other load {load(row)} cores ({row['date']}).{missing}",
            "",
            *table(head, body),
            "",
        ]
    return lines


def step_section(step: list[Row], operators: list[Row]) -> list[str]:
    """The step and its parts."""
    lines = ["## The step", "", *([] if step else [NO_ROWS, ""])]
    for row in step:
        sides = [side for side in STEPS if side in row["sides"]]
        body = [
            [
                STEPS[side],
                spread(row["sides"][side]["core_ms"]),
                spread(row["sides"][side]["ms"]),
                *(
                    signed(row["over_bare_pct"][side][clock]) if side in row["over_bare_pct"] else ""
                    for clock in ("core", "wall")
                ),
                f"{row['peak_rss_mib'][side]:,.0f}" if side in row.get("peak_rss_mib", {}) else "",
            ]
            for side in sides
        ]
        lines += [
            f"**`{short(row['config'])}`, {row['batch']} images on {row['threads']} thread(s), "
            f"{row['precision']}.** The same network, optimizer and batch on all sides; other load {load(row)} "
            f"cores ({row['date']}).",
            "",
            *table(
                ["", "ms of a core", "ms by the clock", "over the bare loop, core", "by the clock", "process, MiB"],
                body,
            ),
            "",
        ]
        if "engine" in row["over_bare_pct"]:
            median = row["over_bare_pct"]["engine"]["core"]["median"]
            word = "met" if median <= GOAL_PCT else "missed"
            lines += [
                f"The goal, at most {GOAL_PCT} % over the bare loop by processor time, is {word} in this run.",
                "",
            ]
        parts = {side: row["sides"][side].get("parts_core_ms", {}) for side in sides}
        if all(parts.values()):
            names = [name for name in PLACES if any(name in parts[side] for side in sides)]
            body = [[PLACES[name], *(f"{parts[side].get(name, 0.0):.2f}" for side in sides)] for name in names]
            body.append(["sum", *(f"{sum(parts[side].values()):.2f}" for side in sides)])
            lines += [
                "Where it goes, ms of a core, means over all rounds:",
                "",
                *table(["part", *(STEPS[side] for side in sides)], body),
                "",
            ]
    for row in operators:
        counts = [row["operators"][side] for side in ("bare", "engine")]
        body = [[PLACES[name], *(each.get(name, 0) for each in counts)] for name in PLACES]
        lines += [
            f"How many of torch's operators a step of `{short(row['config'])}` calls (`benchmarks/step.py "
            "--operators`; the same on any machine). What the engine calls in addition is the norm and the check of "
            "the gradient, statistics of BatchNorm that are applied with the step, and metrics:",
            "",
            *table(["part", "bare loop", "sslrun"], [*body, ["sum", *(f"{sum(each.values()):,}" for each in counts)]]),
            "",
        ]
    return [
        *lines,
        "`sslrun CONFIG --profile N` gives the same parts for a run of your own, with the wait for data, and its "
        "operators: a table, a section of the report, and a trace for [Perfetto](https://ui.perfetto.dev), all in "
        "`profile/` of the run folder.",
        "",
    ]


def scale_section(scale: dict[str, Row], plots: Sequence[str]) -> list[str]:
    """Cost against views, keys, prototypes and ranks."""
    lines = ["## Scale", "", *([] if scale else [NO_ROWS, ""])]
    for plot in plots:
        lines += [f"![Processor time of a step]({plot})", ""]
    for axis, title in AXES.items():
        if axis not in scale:
            continue
        row = scale[axis]
        body = [
            [
                f"{int(value):,}",
                spread(row["core_ms"][value]),
                spread(row["wall_ms"][value]),
                f"{row['step_mib'][value]:,.0f}" if "step_mib" in row else "",
            ]
            for value in row["core_ms"]
        ]
        lines += [
            f"**{title}** (`{row['key']}` of `{row['config']}`, {row['batch']} images; other load {load(row)} "
            f"cores, {row['date']}):",
            "",
            *table(["", "ms of a core per step", "ms by the clock", "MiB during a step"], body),
            "",
        ]
    return lines


def files_section(files: list[Row]) -> list[str]:
    """Cost against the number of files."""
    if not files:
        return []
    body = []
    for row in files:
        first, second = row.get("first_start"), row["second_start"]
        is_quiet = row["load"][0] <= QUIET_LOAD
        cells = [f"{row['count']:,}{'' if row['has_files'] else ', names only'}"]
        cells.append("" if first is None else f"{max(first['each_start_cpu_s']):,.1f}")
        cells.append("" if first is None else f"{first['start_s']:,.1f}" if is_quiet else "busy")
        cells += [f"{second['start_cpu_s']:.2f}", f"{second['start_s']:.2f}" if is_quiet else "busy"]
        cells += ["" if not row["has_files"] else f"{second['first_256_files_read_s']:.2f}" if is_quiet else "busy"]
        cells += [f"{second[f'{moment}_pss_mib']:.0f}" for moment in ("start", "drawn")]
        body.append([*cells, f"{row['tables_mib']:.0f}", f"{row['load'][0]:.1f}"])
    return [
        "**Files** (`benchmarks/many_files.py`: two ranks start at once on small files, first without and then with "
        "the kept tables of names and sizes; memory of each rank with its share of what both map, after the start "
        "and after 100,000 samples in random order; the load average is that before the run):",
        "",
        *table(
            [
                "files",
                "first start, s of a core",
                "s",
                "second start, s of a core",
                "s",
                "256 files read, s",
                "MiB a rank, started",
                "drawn",
                "tables, MiB",
                "load average",
            ],
            body,
        ),
        "",
    ]


def memory_section(memory: list[Row], scale: dict[str, Row], kernels: list[Row]) -> list[str]:
    """Peak memory of all methods."""
    measured = scale.get("methods", {})
    body = []
    for row in memory:
        recipe = "quickstart" if row["case"] == "mocov2" else f"learn/{row['case']}"
        samples = f"{row['accumulation']} x {row['micro_batch']}" if row["accumulation"] > 1 else row["micro_batch"]
        cells = [row["case"], samples, f"{row['peak_gib']:.1f}", f"{row['expected_gib']:.1f}"]
        figures = (measured.get(name, {}).get(recipe) for name in ("step_mib", "expected_mib", "resident_mib"))
        body.append([*cells, *("" if mib is None else f"{mib:,.0f}" for mib in figures)])
    flat = [row for row in kernels if row["operation"] == "info_nce" and "kernel" in row["peak_mib"]]
    lines = [
        "## Memory",
        "",
        "Peak memory of a step of one rank at the recipe's own shapes, in bf16 as on a GPU, rehearsed without one from "
        "the tensors that the step makes and frees (`benchmarks/rehearsal.py`), and what `sslrun --dry-run` says. They "
        "are for a GPU; the last three columns are of the small recipes of `configs/learn` (the quickstart for "
        "MoCo v2), in float32 on the CPU: what torch allocated at the peak of a real step beyond network and images, "
        "what `--dry-run` expects of that, and by how much the process grew, libraries included "
        "(`benchmarks/scale.py --axis methods`):",
        "",
        *table(
            [
                "step of one rank",
                "samples",
                "rehearsed, GiB",
                "`--dry-run`, GiB",
                "small: measured, MiB",
                "`--dry-run`, MiB",
                "process, MiB",
            ],
            body,
        ),
        "",
    ]
    if flat:
        body = [[row["shape"], f"{row['peak_mib']['kernel']:,.1f}", f"{row['peak_mib']['eager']:,.1f}"] for row in flat]
        lines += [
            "MoCo's loss and gradient do not hold the B x K similarities, so that their memory does not grow with "
            "K (MiB that a call adds at its peak, measured on the CPU):",
            "",
            *table(["shape", "sslrun", "eager PyTorch"], body),
            "",
        ]
    return lines


def startup_section(startup: list[Row]) -> list[str]:
    """How long commands take to start."""
    lines = ["## Start", "", *([] if startup else [NO_ROWS, ""])]
    for row in startup:
        for part, title in (("commands", "command"), ("stages", "stage, in order, up to the end of the first step")):
            body = [
                [f"`{name}`" if part == "commands" else name, spread(each["core_s"]), spread(each["wall_s"])]
                for name, each in row[part].items()
            ]
            lines += [*table([title, "s of a core", "s by the clock"], body), ""]
        lines += [f"The run is `{row['config']}`; other load {load(row)} cores ({row['date']}).", ""]
    return lines


def how(loader: list[Row], step: list[Row]) -> list[str]:
    """How the page is made."""
    peers: dict[str, str] = {}
    for row in loader + step:
        peers |= row.get("peers", {})
    own = (loader + step)[-1]["environment"] if loader + step else {}
    versions = {name: own.get(name) for name in ("python", "torch", "dali", "numpy")} | peers
    listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if version)
    return [
        "## How it is measured",
        "",
        "    make peers         # once: what is compared with, in an environment of its own",
        "    make bench         # everything: about an hour on two idle cores, by estimate; QUICK=--quick for less",
        "    python benchmarks/performance_page.py    # this page alone, from the rows in benchmarks/results/",
        "",
        "Sides of a comparison alternate within one run, round by round; each row has quantiles, hardware, "
        "versions, commit and the load by others. Every number on this page is from the newest row of its "
        "measurement; a test compares. Rows made on a busy machine stay comparable by processor time only.",
        "",
        "- The peers have an environment of their own (`benchmarks/peers/requirements.txt`). SPDL is not among "
        "them: it decodes with FFmpeg's shared libraries, which pip does not install.",
        "- lightly's transforms are its classes with their defaults: `MoCoV2Transform`, `SwaVTransform`, "
        "`MAETransform`.",
        "- kornia augments whole batches of images of one size, in the workers. LitData reads its own chunks of "
        "the same files.",
        "- lightly's MoCo is the one of its documentation; it does not shuffle the batch of the keys.",
        "- `benchmarks/loader.py`, `step.py` and `startup.py` take a recipe; `scale.py` has `--axis`.",
        "",
        f"Versions: {listed}.",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Cells


def table(head: Sequence[str], body: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(str(cell) for cell in cells)} |" for cells in body)]


def spread(figures: Figures, digits: int = 2) -> str:
    return f"{figures['median']:,.{digits}f} ({figures['p25']:,.{digits}f}-{figures['p75']:,.{digits}f})"


def times(figures: Figures) -> str:
    """A ratio."""
    return f"**{figures['median']:.2f}** ({figures['p25']:.2f}-{figures['p75']:.2f})"


def signed(figures: Figures) -> str:
    """A difference in percent."""
    return f"{figures['median']:+.1f} % ({figures['p25']:+.1f} to {figures['p75']:+.1f})"


def if_quiet(row: Row, text: str) -> str:
    """A figure by the clock, unless other work disturbed it."""
    value = row["other_load"]
    return text if (value["median"] if isinstance(value, dict) else value) <= QUIET else "busy"


def load(row: Row) -> str:
    """Number of cores that other work kept busy."""
    value = row["other_load"]
    return f"{value['median'] if isinstance(value, dict) else value:.1f}"


def short(recipe: str) -> str:
    """A recipe's name without what is in it."""
    return recipe.split("_resnet")[0]


# ---------------------------------------------------------------------------------------------------------------------
# Plots

WIDTH, LABELS, BAR, GAP = 760, 320, 18, 8


def plots_of(loader: list[Row]) -> list[tuple[str, str]]:
    """A plot of processor time per image for each recipe."""
    plots = []
    for row in loader:
        sides = [side for side in LOADERS if side in row["sides"]]
        bars = [(LOADERS[side], row["sides"][side]["core_ms"], side == "exact") for side in sides]
        title = f"{short(row['recipe'])}, {row['views']}: ms of a core per image, median and quartiles"
        plots.append((f"loader-{short(row['recipe'])}", bar_plot(title, bars)))
    return plots


def scale_plot(scale: dict[str, Row]) -> str:
    """A plot of a step's processor time over that at the first value of its axis."""
    bars = []
    for axis in AXES:
        figures = scale.get(axis, {}).get("core_ms", {})
        unit = next(iter(figures.values()), {}).get("median", 1.0)
        for value, each in figures.items():
            scaled = {key: each[key] / unit for key in ("median", "p25", "p75")}
            bars.append(
                (f"{int(value):,} {axis if int(value) > 1 else axis[:-1]}", scaled, axis in ("views", "prototypes"))
            )
    return bar_plot("ms of a core per step, as a multiple of the first value of each axis", bars)


def bar_plot(title: str, bars: Sequence[tuple[str, Figures, bool]]) -> str:
    """Horizontal bars with their quartiles, as SVG.

    Args:
        title: heading.
        bars: name, quantiles, and whether the bar stands out.
    """
    top, height = 34, 34 + len(bars) * (BAR + GAP) + 6
    most = max(figures["p75"] for _, figures, _ in bars)
    scale = (WIDTH - LABELS - 90) / most
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="20" font-weight="bold" fill="#222222">{html.escape(title)}</text>',
    ]
    for place, (name, figures, stands_out) in enumerate(bars):
        y, length = top + place * (BAR + GAP), scale * figures["median"]
        color = "#0b6e4f" if stands_out else "#a8b3bd"
        low, high = LABELS + scale * figures["p25"], LABELS + scale * figures["p75"]
        middle, end = y + BAR / 2, max(high, LABELS + length)
        parts += [
            f'<text x="{LABELS - 8}" y="{y + 14}" text-anchor="end" fill="#222222">{html.escape(name)}</text>',
            f'<rect x="{LABELS}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{color}"/>',
            f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="#222222" stroke-width="1.5"/>',
            f'<text x="{end + 6:.1f}" y="{y + 14}" fill="#222222">{figures["median"]:.2f}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
