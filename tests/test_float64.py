"""In float64, where rounding cannot hide a difference, a step is the same for any number of ranks and micro-batches.

By day the table of docs/equality.md is compared with its rows. Each night all methods run anew; `make equality-table`
writes rows and table.
"""

import contextlib
import io
import json
from pathlib import Path

import pytest

import tables
from ranks import run_ranks
from sslrun import cli, plan
from sslrun.config import load, naming
from sslrun.rehearsal import StepMemory

ROWS, KEY, PAGE = "float64", "recipe", "equality.md"
ROOT = Path(__file__).resolve().parents[1]
METHODS = ["quickstart", *(f"learn/{path.stem}" for path in sorted((ROOT / "configs/learn").glob("*.toml")))]
# A network that draws random numbers, with crops of two sizes.
DRAWING = {
    "learn/dino, drop_path and rotary_rescale": [
        'model.backbone={ _delete_ = true, type = "VisionTransformer", img_size = 40, patch_size = 8, embed_dim = 48, '
        'depth = 3, num_heads = 3, positions = "rotary", rotary_rescale = 2.0, drop_path = 0.1 }',
        "model.neck.in_channels=48",
        'data.views=[{ num_views = 2, transforms = [{ type = "RandomResizedCrop", size = 40 }, { type = "Normalize" }] '
        '}, { num_views = 3, transforms = [{ type = "RandomResizedCrop", size = 24 }, { type = "Normalize" }] }]',
    ]
}
NAMES = [*METHODS, *DRAWING]
# SyncBN has the statistics of the samples that are on the devices at once: BatchNorm groups in its place.
SYNC_BN = {
    "learn/npid": ["model.backbone"],
    **{f"learn/{name}": ["model.neck", "model.head.predictor"] for name in ("byol", "mocov3", "nnclr", "simsiam")},
    **{
        f"learn/{name}": ["model.neck"]
        for name in ("barlowtwins", "dino", "ibot", "lejepa", "odc", "simclr", "swav", "vicreg")
    },
}
BATCH, GROUP = 32, 8
CUTS = {f"{ranks} x {size}": (ranks, size) for ranks, size in ((1, 16), (1, 8), (2, 16), (2, 8), (4, 8))}
QUANTITIES = ("train/loss", "train/grad_norm", "train/feature_std")  # not every method has the last
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


def trained(words: list[str]) -> tuple[int, str]:
    plan.rehearse = lambda *_: StepMemory(0, 0, 0, 0, 0)  # half of the time of such a short run
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(words)
    return code, err.getvalue()


def first_step(folder: Path, name: str, ranks: int, micro_batch: int, *settings: str) -> dict[str, float]:
    """The row of the first of two steps."""
    first, second = steps_of(folder, name, ranks, micro_batch, *settings)
    assert first["train/loss"] != second["train/loss"]
    return first


def steps_of(folder: Path, name: str, ranks: int, micro_batch: int, *settings: str) -> list[dict[str, float]]:
    """The rows of all steps of a run: two, unless the settings say otherwise."""
    place = folder / f"{ranks}-{micro_batch}"
    place.mkdir()
    recipe = place / "step.toml"
    values = {"configs": ROOT / "configs", "name": name.split(",")[0], "batch": BATCH, "group": GROUP}
    recipe.write_text(RECIPE.format(**values, folder=place, shapes=folder.parent / "shapes", micro_batch=micro_batch))
    words = [str(recipe), *(word for setting in (*DRAWING.get(name, ()), *settings) for word in ("--set", setting))]
    for code, err in run_ranks(trained, ranks, words):
        assert code == 0, err
    rows = [json.loads(line) for line in (place / "step" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/loss" in row]


def differences(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """Relative differences of what is in both rows."""
    return {key: abs(a[key] / b[key] - 1) for key in QUANTITIES if key in b}


def largest_difference(a: dict[str, float], b: dict[str, float]) -> float:
    return max(differences(a, b).values())


@pytest.mark.nightly
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_the_same_for_all_ranks_and_micro_batches(tmp_path, name):
    groups = [f'{part}.norm_cfg={{type="BN"}}' for part in SYNC_BN.get(name.split(",")[0], ())]
    whole = first_step(tmp_path, name, 1, BATCH, *groups)
    cuts = {way: differences(first_step(tmp_path, name, *cut, *groups), whole) for way, cut in CUTS.items()}
    row = {KEY: name, "cuts": cuts}
    if tables.is_writing():
        tables.replace(ROWS, KEY, NAMES, row)
    assert_within(row)


@pytest.mark.nightly
def test_later_steps_are_the_same_too(tmp_path):
    """What grows from step to step in float32 (docs/equality.md) is rounding. BYOL's loss differs most there."""
    settings = [f'{part}.norm_cfg={{type="BN"}}' for part in SYNC_BN["learn/byol"]]
    whole, cut, other = (
        steps_of(tmp_path, "learn/byol", *way, *settings, "max_iters=4") for way in ((1, BATCH), (2, 16), (4, 8))
    )
    assert len(whole) == 4
    for one, *others in zip(whole, cut, other, strict=True):
        assert max(largest_difference(each, one) for each in others) < TOLERANCE


def assert_within(row: tables.Row) -> None:
    assert list(row["cuts"]) == list(CUTS)
    for way, found in row["cuts"].items():
        assert {"train/loss", "train/grad_norm"} <= found.keys() and max(found.values()) < TOLERANCE, (row[KEY], way)


def test_the_table_has_every_method():
    rows = tables.rows(ROWS)
    assert [row[KEY] for row in rows] == NAMES
    trained = {load(ROOT / f"configs/{name}.toml").values["model"]["type"] for name in METHODS}
    assert trained == set(naming.methods()) - {"Supervised"}
    for row in rows:
        assert_within(row)
    tables.check(PAGE, "float64", lines)


def lines() -> list[str]:
    table = [f"| recipe | {' | '.join(CUTS)} |", "|---" * (len(CUTS) + 1) + "|"]
    for row in tables.rows(ROWS):
        cells = [" ".join(f"{found[key]:.0e}" for key in QUANTITIES if key in found) for found in row["cuts"].values()]
        table.append(f"| `{row[KEY]}` | {' | '.join(cells)} |")
    return table


@pytest.mark.nightly
@pytest.mark.parametrize(
    "settings",
    [["engine.split_sync_bn=true"], ['model.neck.norm_cfg={type="BN"}', "engine.gradient_cache=false"]],
)
def test_what_accumulation_changes_is_seen(tmp_path, settings):
    """SyncBN, and a loss that compares samples without the gradient cache: on ranks they are the same, cut they are
    not."""
    whole, on_ranks, cut = (
        first_step(tmp_path, "learn/simclr", ranks, size, *settings) for ranks, size in ((1, 32), (2, 16), (1, 16))
    )
    assert largest_difference(on_ranks, whole) < TOLERANCE
    assert largest_difference(cut, whole) > 1e-3


@pytest.mark.nightly
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["learn/simclr", "learn/swav"])
def test_the_gradient_cache_under_zero(tmp_path, name, zero_stage):
    """In float32, whose rounding differs with the order of sums."""
    settings = ['model.neck.norm_cfg={type="BN"}', 'engine.precision="fp32"', f"engine.zero_stage={zero_stage}"]
    if name == "learn/swav":
        settings.append("model.freeze_prototypes_iters=0")  # else the loss itself gives no parameter a gradient
    whole, cut = (first_step(tmp_path, name, ranks, size, *settings) for ranks, size in ((1, 32), (2, 8)))
    assert largest_difference(cut, whole) < 1e-3
