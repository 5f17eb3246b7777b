"""In float64, where rounding cannot hide a difference, a step is the same for any number of ranks and micro-batches."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from ranks import run_ranks
from sslrun import cli

ROOT = Path(__file__).resolve().parents[1]
METHODS = ["quickstart", *(f"learn/{path.stem}" for path in sorted((ROOT / "configs/learn").glob("*.toml")))]
# Their losses, or SyncBN, compare the samples that are on the devices at once.
COMPARES = {f"learn/{name}" for name in ("barlowtwins", "npid", "simclr", "swav")}
BATCH, GROUP, GROUPS = 32, 8, {"learn/relative_loc": 32}
CUTS = [(1, 8), (1, 16), (2, 8), (2, 16), (4, 8)]  # ranks, samples of a micro-batch
TOLERANCE = 1e-9  # relative

RECIPE = """
extends = "{configs}/{name}.toml"
_delete_ = ["epochs"]
max_iters = 2
global_batch = {batch}
work_dir = "{folder}"

[data]
samples_per_gpu = {group}
source = {{ root = "{shapes}", num_images = 64, size = 40 }}
holdout = {{ root = "{shapes}", num_images = 40, size = 40 }}

[engine]
precision = "fp64"
micro_batch = {micro_batch}

[log]
interval = 1

[monitor]
_delete_ = true

[lr]
_delete_ = true
policy = "Constant"
"""


def trained(path: str) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = cli.main([path])
    return code, err.getvalue()


def steps(folder: Path, shapes: Path, name: str, ranks: int, micro_batch: int) -> list[dict[str, float]]:
    """The rows of two steps."""
    folder.mkdir()
    recipe = folder / "step.toml"
    values = {"configs": ROOT / "configs", "name": name, "batch": BATCH, "group": GROUPS.get(name, GROUP)}
    recipe.write_text(RECIPE.format(**values, folder=folder, shapes=shapes, micro_batch=micro_batch))
    for code, err in run_ranks(trained, ranks, str(recipe)):
        assert code == 0, err
    rows = [json.loads(line) for line in (folder / "step" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/loss" in row]


@pytest.mark.nightly
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_same_for_all_ranks_and_micro_batches(tmp_path, tmp_path_factory, name):
    shapes = tmp_path_factory.getbasetemp() / "shapes of float64"
    first, second = steps(tmp_path / "one", shapes, name, 1, BATCH)
    assert first["train/loss"] != second["train/loss"]
    for ranks, micro_batch in CUTS:
        if micro_batch < GROUPS.get(name, GROUP):
            continue
        row, _ = steps(tmp_path / f"{ranks} {micro_batch}", shapes, name, ranks, micro_batch)
        differences = [abs(row[key] / first[key] - 1) for key in ("train/loss", "train/grad_norm")]
        if name in COMPARES and ranks * micro_batch < BATCH:  # that it is not the same shows that the test can fail
            assert max(differences) > 1e-6, (ranks, micro_batch, differences)
        else:
            assert max(differences) < TOLERANCE, (ranks, micro_batch, differences)
