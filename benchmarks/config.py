"""Measures how long a recipe takes to load: to read all its files, merge, resolve and check them.

    python benchmarks/config.py    every shipped recipe, processor time of this process, a row in results/config.jsonl

Only the schema and the parser are in memory before; nothing of a recipe is cached.
"""

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "benchmarks")]

from rows import append_row, quantiles

from sslrun.config import load

REPEATS = 21


def main() -> None:
    files = sorted((ROOT / "configs").rglob("*.toml"))
    recipes = [path for path in files if not {"_base_", "benchmarks"} & set(path.relative_to(ROOT).parts)]
    load(recipes[0])  # imports, and the schema
    medians_ms = {str(path.relative_to(ROOT)): statistics.median(times_ms(path)) for path in recipes}
    slowest = max(medians_ms, key=lambda name: medians_ms[name])
    figures = quantiles(list(medians_ms.values()))
    append_row("config", {"benchmark": "config", "processor_ms_of_recipes": figures, "slowest": slowest})
    print(f"{len(recipes)} recipes: {figures['median']:.2f} ms (median), {figures['max']:.2f} ms ({slowest})")


def times_ms(path: Path) -> list[float]:
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        load(path)
        times.append(1e3 * (time.process_time() - start))
    return times


if __name__ == "__main__":
    main()
