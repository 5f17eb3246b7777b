"""docs/performance.md is what the rows give, and shows the newest of each measurement."""

import copy
import importlib.util
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("performance_page", ROOT / "benchmarks/performance_page.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["performance_page"] = module
    specification.loader.exec_module(module)
    return module


def q(median: float) -> dict[str, float]:
    return {"min": median, "p25": 0.9 * median, "median": median, "p75": 1.1 * median, "max": median, "count": 3}


ABOUT = {"date": "2026-01-02", "environment": {"cores": 2, "cpu": "Abacus", "torch": "2.13.0"}, "load_average": 9.0}


def loader_row(core_ms: float) -> dict:
    side = {
        "images_per_s": q(700),
        "core_ms": q(core_ms),
        "cores": q(1.5),
        "read_mb_per_s": 70.0,
        "made_mb_per_s": 800.0,
    }
    return {
        "recipe": "mocov2_resnet50_x", "views": "2 x 224", "images": "512 JPEGs", "batch": 32, "threads": 2,
        "sides": {name: side for name in ("exact", "decode", "pil", "simplejpeg", "lightly")},
        "over_exact": {name: {"wall": q(4), "core": q(5)} for name in ("decode", "pil", "simplejpeg", "lightly")},
        "other_load": q(1.2), "left_out": {"kornia": "it is not there"}, "peers": {"lightly": "1.6.0"}, **ABOUT,
    }  # fmt: skip


def step_row() -> dict:
    parts = {
        "targets": 10.0,
        "forward": 20.5,
        "backward": 30.25,
        "update": 4.0,
        "momentum": 1.0,
        "before the step": 0.25,
    }
    sides = {name: {"ms": q(70), "core_ms": q(66), "parts_core_ms": parts} for name in ("bare", "engine", "lightly")}
    return {
        "config": "quickstart", "batch": 64, "threads": 1, "precision": "fp32", "sides": sides,
        "over_bare_pct": {name: {"wall": q(2.5), "core": q(1.5)} for name in ("engine", "lightly")},
        "peak_rss_mib": {"bare": 500.0, "engine": 503.0}, "other_load": q(0.1), **ABOUT,
    }  # fmt: skip


def files_row(count: int, first_s: float | None) -> dict:
    start = {"start_s": 0.75, "start_cpu_s": 0.5, "start_pss_mib": 2.0, "drawn_pss_mib": 80.0}
    start |= {"first_256_files_read_s": 0.125} if first_s else {}
    first = {"first_start": {"start_s": first_s, "each_start_cpu_s": [0.25, 7.5]}} if first_s else {}
    return {
        "count": count, "engine": "after", "ranks": 2, "has_files": first_s is not None, "load": [0.25, 9.0], **first,
        "second_start": start, "tables_mib": 678.0, **ABOUT,
    }  # fmt: skip


@pytest.fixture
def rows(script):
    axis = {
        "config": "quickstart",
        "key": "k",
        "batch": 64,
        "wall_ms": {"2": q(9.5), "4": q(17)},
        "core_ms": {"2": q(8), "4": q(16)},
    }
    time = {"wall_s": q(0.5), "core_s": q(0.25)}
    return {
        **script.read_rows(),
        "loader": [loader_row(9.0), loader_row(1.5)],
        "step": [
            step_row(),
            {"config": "quickstart", "operators": {"bare": {"forward": 100}, "engine": {"forward": 110, "update": 7}},
             **ABOUT},
        ],
        "scale": [
            {"axis": "views", "step_mib": {"2": 100.0, "4": 190.0}, "other_load": 0.5, **axis, **ABOUT},
            {"axis": "ranks", "other_load": 0.5, **axis, **ABOUT},
            {"axis": "methods", "step_mib": {"quickstart": 77.0, "learn/simclr": 88.0},
             "expected_mib": {"quickstart": 78.0, "learn/simclr": 89.0},
             "resident_mib": {"quickstart": 97.0, "learn/simclr": 99.0}, "other_load": 0.5, **ABOUT},
        ],
        "many_files": [files_row(10**7, None), files_row(10**4, 12.5), {**files_row(10**4, 3.0), "engine": "before"}],
        "startup": [
            {"config": "quickstart", "commands": {"sslrun --help": time}, "stages": {"import of torch": time},
             "other_load": 0.5, **ABOUT}
        ],
    }  # fmt: skip


def test_the_page_is_what_the_rows_give(script):
    made = script.pages(script.read_rows())
    assert {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in made} == made
    plots = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs/performance").glob("*")}
    assert plots == made.keys() - {"performance.md"}


def test_the_newest_row_counts_and_every_figure_is_shown(script, rows):
    text = script.pages(rows)["performance.md"]
    assert "| 1.50 (1.35-1.65) | 700 (630-770) | 1.50 | 70 | 800 |" in text and "9.00 (8.10" not in text
    first = text[: text.index("## Loading")]
    assert "lightly's transforms in a DataLoader | **5.00** (4.50-5.50) | busy | 1.2 |" in first
    assert "a training step of `quickstart`, 64 images | bare loop | **1.00** | 1.00 | 0.1 |" in first
    assert "PIL and kornia in a DataLoader is missing: it is not there." in text
    assert "+1.5 % (+1.4 to +1.7)" in text and "| sum | 66.00 | 66.00 | 66.00 |" in text
    assert "| encoder and loss, forward | 100 | 110 |" in text and "| sum | 100 | 117 |" in text
    assert (
        "| mocov2 | 256 | 11.0 | 11.2 | 77 | 78 | 97 |" in text
        and "| 4 | 16.00 (14.40-17.60) | 17.00 (15.30-18.70) | 190 |" in text
    )
    assert "| `sslrun --help` | 0.25 (0.23-0.28) | 0.50 (0.45-0.55) |" in text and "lightly 1.6.0" in text
    small, large = (text.index(line) for line in (
        "| 10,000 | 7.5 | 12.5 | 0.50 | 0.75 | 0.12 | 2 | 80 | 678 | 0.2 |",
        "| 10,000,000, names only |  |  | 0.50 | 0.75 |  | 2 | 80 | 678 | 0.2 |",
    ))  # fmt: skip
    assert small < large and text.count("| 10,000 |") == 1
    assert "nan" not in text and "None" not in text
    rows["loader"][-1]["other_load"] = q(0.2)
    assert "| **5.00** (4.50-5.50) | **4.00** (3.60-4.40) | 0.2 |" in script.pages(rows)["performance.md"]
    changed = copy.deepcopy(rows)
    changed["loader"][-1]["sides"]["exact"]["core_ms"]["median"] = 1.51
    assert script.pages(changed) != script.pages(rows)


def test_tables_are_tables(script, rows):
    blocks = re.findall(r"(?:^\|.*\n)+", script.pages(rows)["performance.md"], re.MULTILINE)
    assert len(blocks) > 8
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_a_plot_has_a_bar_for_each_side(script, rows):
    plot = ElementTree.fromstring(script.pages(rows)["performance/loader-mocov2.svg"])
    bars = [each for each in plot if each.tag.endswith("rect") and "x" in each.attrib]
    assert len(bars) == 5 and len({bar.attrib["width"] for bar in bars}) == 1
    rows["loader"][-1]["sides"]["pil"] = json.loads(json.dumps(rows["loader"][-1]["sides"]["pil"]))
    rows["loader"][-1]["sides"]["pil"]["core_ms"] = q(3.0)
    plot = ElementTree.fromstring(script.pages(rows)["performance/loader-mocov2.svg"])
    widths = [float(each.attrib["width"]) for each in plot if each.tag.endswith("rect") and "x" in each.attrib]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)  # sslrun, then PIL


def test_the_steps_of_an_axis_are_drawn_as_multiples_of_the_first(script, rows):
    plot = ElementTree.fromstring(script.pages(rows)["performance/scale.svg"])
    widths = [float(each.attrib["width"]) for each in plot if each.tag.endswith("rect") and "x" in each.attrib]
    names = [each.text for each in plot if each.attrib.get("text-anchor") == "end"]
    assert names == ["2 views", "4 views", "2 ranks", "4 ranks"]
    assert widths == pytest.approx([widths[0], 2 * widths[0]] * 2, abs=0.2)


def test_a_page_without_rows_says_nothing_wrong(script):
    text = script.pages({name: [] for name in script.BENCHMARKS})["performance.md"]
    assert text.startswith("# Performance") and "None" not in text
