"""benchmarks/first_light.py: all parts at toy size; parts that crash, hang or fail; the tables. No time is checked."""

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from bare_image import BARE, environment_without

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "first_light.py"
# Parts whose items do what they are called, run by the real loop over items.
PLANTED = """
import os, signal, sys, time
sys.path.insert(0, {benchmarks!r})
import first_light_parts as parts

def item(lab, name):
    if name == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hangs":
        time.sleep(600)
    if name == "fails":
        raise ValueError("as planted\\nin two lines")
    if name == "is skipped":
        raise parts.Skipped("nothing to do")
    return {{"summary": "fine"}}

names = ["works", "crashes", "fails", "hangs", "is skipped", "works too"]
parts.PARTS = {{
    "versions": (lambda lab: names, item),
    "step": (lambda lab: ["hangs"], item),
    "vit": (lambda lab: ["works"], item),
}}
sys.exit(parts.main())
"""


def load(name: str):
    specification = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # its dataclasses look there
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return load("first_light")


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "first_light.jsonl").read_text().splitlines()]


def run(folder: Path, environment: dict[str, str] | None, *words: str) -> tuple[int, str, list[dict]]:
    """(exit code, output, rows) of a run on the CPU at toy size."""
    command = [
        sys.executable,
        str(SCRIPT),
        "--device",
        "cpu",
        "--tiny",
        "--minutes",
        "60",
        "--out",
        str(folder / "out"),
        *words,
    ]
    done = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True)
    return done.returncode, done.stdout, rows(folder / "out")


def check(script, code: int, output: str, found: list[dict], missing: set[str]) -> None:
    """All parts were run to their ends; what is skipped needs what is missing."""
    assert code == 0, output
    assert {row["part"] for row in found} == script.PARTS.keys()
    assert {row["item"] for row in found if row["status"] == "skipped"} == missing
    assert all(torch.__version__.startswith(row["environment"]["torch"]) and row["seconds"] >= 0 for row in found)
    steps = [row for row in found if row["part"] in ("step", "methods", "vit")]
    assert len(steps) >= 4 + 13 + 2
    assert all(row["tflop"] > 0 and row["images_per_s"] > 0 and row["ms"]["count"] == 2 for row in steps)
    assert len([row for row in found if row["part"] == "kernels"]) >= 8
    assert "| mocov2 | eager |" in output and "| swav | eager |" in output


def test_parts_run_without_dali_and_deepspeed(tmp_path):
    """Four of them, which need no torch.compile; all run nightly."""
    parts = ("versions", "kernels", "views", "training")
    code, output, found = run(
        tmp_path, environment_without(tmp_path / "bare", BARE), *(f"--only={part}" for part in parts)
    )
    assert code == 0, output
    assert {row["part"] for row in found} == set(parts) and found[0]["missing"] == list(BARE)
    assert {row["item"] for row in found if row["status"] == "skipped"} == {"jpegs", "mocov2"}
    assert len([row for row in found if row["part"] == "kernels"]) >= 8


@pytest.mark.nightly
def test_all_parts_run_without_dali_and_deepspeed(script, tmp_path):
    code, output, found = run(tmp_path, environment_without(tmp_path / "bare", BARE))
    check(script, code, output, found, missing={"jpegs", "mocov2"})
    assert found[0]["missing"] == list(BARE)


@pytest.mark.nightly
def test_all_parts_run_with_everything_installed(script, tmp_path):
    check(script, *run(tmp_path, None), missing=set())


@pytest.mark.nightly
def test_a_crash_a_hang_and_an_error_end_nothing_else(script, tmp_path, monkeypatch, capsys):
    program = tmp_path / "planted.py"
    program.write_text(PLANTED.format(benchmarks=str(BENCHMARKS)))
    monkeypatch.setattr(script, "PROGRAM", program)
    limited = script.Part("", 600, 20)
    monkeypatch.setattr(script, "PARTS", {"versions": limited})
    monkeypatch.setattr(sys, "argv", ["first_light.py", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert script.main() == 1
    found = {row["item"]: row for row in rows(tmp_path / "out")}
    assert [row["status"] for row in found.values()] == ["done", "failed", "failed", "failed", "skipped", "done"]
    assert found["crashes"]["error"].startswith("SIGSEGV: ")
    assert found["fails"]["error"].startswith("ValueError: as planted")
    assert found["hangs"]["error"] == "killed: it took longer than 20 s"
    assert found["is skipped"]["reason"] == "nothing to do"
    assert "Traceback" in (tmp_path / "out/log.txt").read_text()
    assert "- failed: versions, hangs: killed" in capsys.readouterr().out


@pytest.mark.nightly
def test_the_time_is_kept(script, tmp_path, monkeypatch):
    program = tmp_path / "planted.py"
    program.write_text(PLANTED.format(benchmarks=str(BENCHMARKS)))
    monkeypatch.setattr(script, "PROGRAM", program)
    monkeypatch.setattr(script, "PARTS", dict.fromkeys(["step", "vit"], script.Part("", 600, 600)))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["first_light.py", "--device", "cpu", "--out", str(out), "--minutes", "0.2"])
    assert script.main() == 0
    over = "the time is over"
    assert [(row["part"], row["item"], row["reason"]) for row in rows(out)] == [
        ("step", "hangs", over),
        ("vit", "-", over),
    ]


@pytest.mark.nightly
def test_a_part_takes_no_time_from_those_that_follow(script, tmp_path, monkeypatch):
    program = tmp_path / "planted.py"
    program.write_text(PLANTED.format(benchmarks=str(BENCHMARKS)))
    monkeypatch.setattr(script, "PROGRAM", program)
    monkeypatch.setattr(script, "PARTS", {"step": script.Part("", 15, 600), "vit": script.Part("", 60, 60)})
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["first_light.py", "--device", "cpu", "--out", str(out)])
    assert script.main() == 0
    assert [(row["item"], row["status"]) for row in rows(out)] == [("hangs", "skipped"), ("works", "done")]


def test_what_is_missing_is_one_line(tmp_path):
    environment = environment_without(tmp_path / "bare", ["tomli", "tomli_w"])
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {sys.executable} lacks tomli, tomli-w: pip install tomli tomli-w\n"


def test_waits_are_counted_where_they_are(monkeypatch):
    step = load("engine_step")
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits() -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)  # torch says so once

    assert [place.partition(":")[0] for place in step.host_waits(waits)] == ["test_first_light.py"]
    assert modes == ["warn", "default"]


def test_the_document_has_the_tables_of_the_last_run_of_each_gpu(tmp_path, monkeypatch):
    tables = load("first_light_table")
    document, results = tmp_path / "gpu.md", tmp_path / "first_light.jsonl"
    start, end = tables.markers("first light")
    document.write_text(f"before\n{start}\n{end}\nafter\n")
    monkeypatch.setattr(tables, "DOCUMENT", document)
    monkeypatch.setattr(tables, "ROWS", results)
    monkeypatch.setattr(tables, "COMPILED", tmp_path / "none.json")
    tables.write_tables()
    assert document.read_text() == f"before\n{start}\n\n{tables.NONE_YET}\n\n{end}\nafter\n"
    about = {"gpus": ["NVIDIA H100"], "commit": "0123456789", "dirty": False}
    row = {"part": "other_tests", "item": "x", "status": "done", "date": "2026-01-01", "environment": about}
    lines = [{**row, "run": name, "summary": f"{name} passed"} for name in ("1", "2")]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tables.write_tables()
    tables.write_tables()
    text = document.read_text()
    assert text.count("### NVIDIA H100") == 1 and "2 passed" in text and "1 passed" not in text
    assert text.startswith("before\n") and text.endswith(f"{end}\nafter\n")


def test_the_document_has_the_compiled_steps(tmp_path, monkeypatch):
    tables = load("first_light_table")
    document, compiled = tmp_path / "gpu.md", tmp_path / "compiled_step.json"
    marks = [tables.markers(name) for name in ("compiled", "first light")]
    document.write_text("".join(f"{start}\n{end}\n" for start, end in marks))
    graph = {"child": "backbone", "phase": "forward", "launches": 300, "library_calls": 53, "gb": 30.25, "runs": 2}
    step = {"recipe": "mocov2", "settings": [], "micro_batch": 256, "launches": 1166, "library_calls": 170, "gb": 131.0}
    compiled.write_text(json.dumps({"steps": [{**step, "graphs": [graph]}]}))
    for name, path in (("DOCUMENT", document), ("COMPILED", compiled), ("ROWS", tmp_path / "none.jsonl")):
        monkeypatch.setattr(tables, name, path)
    tables.write_tables()
    text = document.read_text()
    assert "| **mocov2**, 256 samples | 1,166 | 170 | 131.0 |\n| backbone, forward x 2 | 600 | 106 | 60.5 |\n" in text
