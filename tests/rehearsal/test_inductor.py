"""What torch's compiler makes of a step for an H100, without one: one graph per network and crop size, and no spills.

`python tests/rehearsal/test_inductor.py [NAME]...` rewrites the table, benchmarks/results/compiled_step.json, or its
rows of these names.
"""

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from rehearsal.processes import ROOT, compiled, run

TABLE = ROOT / "benchmarks/results/compiled_step.json"
TIMEOUT_S = 3600
TOLERANCE = 0.1  # of a step's totals
VERSIONS = {"torch": torch.__version__.partition("+")[0], "triton": triton.__version__}
SETTINGS = {  # recipe: settings; the batch is that of one GPU
    "mocov2": [],  # ResNet-50 with BatchNorm groups
    "selfsup/mocov3/mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k": ["global_batch=256"],  # projector, predictor
    "swav": ["model.backbone.depth=18", "model.neck.in_channels=512"],  # two crop sizes
}
# A small network, for what is wrong on purpose.
SMALL = ["model.backbone.depth=18", "model.neck.in_channels=512", "global_batch=64", "engine.precision=bf16"]


def compiling(library: Path, folder: Path, module: str, *arguments: str) -> Any:
    """What a module that compiles finds, with caches in `folder`."""
    path = os.pathsep.join([str(ROOT / "tests/kernels"), os.environ.get("PYTHONPATH", "")])
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    with mock.patch.dict(os.environ, caches | {"PYTHONPATH": path}):
        (found,) = run(library, module, *arguments, timeout_s=TIMEOUT_S)
        return found


def compile_step(library: Path, folder: Path, recipe: str, settings: list[str], *options: str) -> dict[str, Any]:
    """What `rehearsal.inductor` finds."""
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    return compiling(library, folder, "rehearsal.inductor", f"configs/{recipe}.toml", *arguments, *options)


def faults(found: dict[str, Any]) -> list[str]:
    """Whatever is not one graph per network and crop size, with and without gradient, in kernels without spills."""
    graphs = Counter((child, "with" if has_gradient else "without") for child, _, has_gradient in found["compilations"])
    crops = found["crops"]
    return [
        *(f"{n} graphs of {child} {gradient} gradient" for (child, gradient), n in graphs.items() if n > crops),
        *(f"graph break: {reason.splitlines()[0]}" for reason in found["breaks"]),
        *(f"spills with all sizes: {kernel}" for kernel in found["unusable"]),
    ]


def row(recipe: str, found: dict[str, Any]) -> dict[str, Any]:
    """The row of the table: launches, library calls and 10^9 bytes of a step, and of each graph."""
    graphs = found["graphs"]
    return {
        "recipe": recipe,
        "settings": SETTINGS[recipe],
        "micro_batch": found["micro_batch"],
        "launches": sum(g["launches"] * g["runs"] for g in graphs) + int(found["outside"]["launches"]),
        "library_calls": sum(g["library_calls"] * g["runs"] for g in graphs),
        "gb": round(sum(g["gb"] * g["runs"] for g in graphs) + found["outside"]["gb"], 2),
        "outside": found["outside"],
        "kernels": found["num_kernels"],
        "kernels_that_spill_with_some_sizes": len({name.partition(":")[0] for name in found["spilling"]}),
        "graphs": graphs,
    }


def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", SETTINGS)
def test_a_step_compiles_for_an_h100(played, tmp_path, recipe):
    found = compile_step(played, tmp_path, recipe, SETTINGS[recipe], "--assemble")
    assert faults(found) == []
    assert {graph["phase"] for graph in found["graphs"]} >= {"forward", "backward"}
    if {key: table()[key] for key in VERSIONS} == VERSIONS:
        (expected,) = (line for line in table()["steps"] if line["recipe"] == recipe)
        assert changes(row(recipe, found), expected) == [], f"look why, then `python {Path(__file__).name} {recipe}`"


def changes(line: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Totals of a row that differ from the committed ones."""
    totals = ("launches", "library_calls", "gb")
    return [
        f"{name}: {line[name]} instead of {expected[name]}"
        for name in totals
        if abs(line[name] / expected[name] - 1) > TOLERANCE
    ]


@pytest.mark.nightly
def test_a_graph_break_would_be_found(played, tmp_path):
    whole = compile_step(played, tmp_path, "mocov2", SMALL)
    assert faults(whole) == []
    broken = compile_step(played, tmp_path, "mocov2", SMALL, "--break-in=backbone.layer2")
    told = faults(broken)
    assert any(fault.startswith("graph break") for fault in told)
    assert any("graphs of backbone with gradient" in fault for fault in told)


def test_more_graphs_than_crop_sizes_spills_and_more_launches_would_be_found():
    line = {"launches": 100, "library_calls": 10, "gb": 5.0}
    assert changes(line, line) == [] and len(changes(line | {"launches": 200, "gb": 2.0}, line)) == 2
    found = {"crops": 1, "compilations": [["neck", [2, 3], True]], "breaks": [], "unusable": []}
    assert faults(found) == []
    assert faults(found | {"crops": 2, "compilations": [["neck", [2, 3], True], ["neck", [4, 3], True]]}) == []
    assert len(faults(found | {"compilations": [["neck", [2, 3], True], ["neck", [4, 3], True]]})) == 1
    assert faults(found | {"unusable": ["triton_red_fused_0"]}) == ["spills with all sizes: triton_red_fused_0"]


@pytest.mark.nightly
def test_batchnorm_in_groups_moves_what_torchs_layer_moves(played, tmp_path):
    """One more pass over the activations of the block, forward or backward, is 7 % and more."""
    found = compiling(played, tmp_path, "rehearsal.norm_traffic")
    for phase in ("forward", "backward"):
        for groups in ("1 group", "8 groups"):
            assert found[groups][phase]["gb"] < 1.01 * found["torch"][phase]["gb"], (groups, found)


def measure(recipes: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        library = compiled(Path(name))
        steps = {line["recipe"]: line for line in table()["steps"]} if TABLE.exists() else {}
        for recipe in recipes or list(SETTINGS):
            found = compile_step(library, Path(name), recipe, SETTINGS[recipe], "--assemble")
            print(recipe, faults(found) or "no faults", found["spilling"], flush=True)
            write(steps := steps | {recipe: row(recipe, found)})


def write(steps: dict[str, dict[str, Any]]) -> None:
    """Writes the table from its rows by recipe, with a line for each graph."""
    lines = []
    for recipe in filter(steps.get, SETTINGS):
        head = json.dumps({key: value for key, value in steps[recipe].items() if key != "graphs"})
        graphs = ",\n      ".join(json.dumps(graph) for graph in steps[recipe]["graphs"])
        lines.append(f'    {head[:-1]}, "graphs": [\n      {graphs}\n    ]}}')
    text = f'{json.dumps(VERSIONS)[:-1]}, "steps": [\n' + ",\n".join(lines) + "\n]}\n"
    TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    measure(sys.argv[1:])
