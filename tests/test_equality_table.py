"""The table of docs/equality.md: in float32, every ZeRO stage on 2 and 4 ranks trains as one process does.

By day the table is compared with its rows. Each night all cases run anew; `make equality-table` writes rows and table.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import small_run
import tables
from ranks import run_ranks
from several_runs import train_all
from sslrun import session
from sslrun.config import load
from sslrun.runtime import checkpoint
from test_float64 import BATCH, GROUP, RECIPE, ROOT

ROWS, KEY, PAGE = "equality", "case", "equality.md"
STEPS, STAGES = 4, (0, 1, 2, 3)
CUTS = [(2, 16), (2, 8), (4, 8)]  # ranks, samples of a micro-batch
# Relative. Rounding grows from step to step, where a unit of a ReLU turns by a thousand; faults show in the first step.
# Rounding depends on the processor: on one, the loss of BYOL differs by 2e-5, on another by 1.5e-4.
TOLERANCE = {"loss": 1e-3, "first gradient": 1e-5, "gradients": 2e-2, "weights": 2e-2, "buffers": 1e-3}

BN = 'norm_cfg={type="BN"}'
LARS = ['optimizer={_delete_=true, type="LARS", lr=0.8, momentum=0.9, weight_decay=1e-4}']
SGD = ['optimizer={_delete_=true, type="SGD", lr=0.05, momentum=0.9, weight_decay=1e-4}']
VIT = '{_delete_=true, type="VisionTransformer", img_size=40, patch_size=8, embed_dim=32, depth=2, num_heads=2}'
RESNET = ["model.backbone.base_width=8", "model.neck.in_channels=64"]
METHODS: dict[str, tuple[str, list[str]]] = {
    "MoCo v2, ResNet, SGD": ("quickstart", ["model.queue_len=64", *RESNET, *SGD]),
    "SimCLR, ResNet, LARS": ("learn/simclr", [f"model.neck.{BN}", *RESNET, *LARS]),
    "SwAV, ResNet, LARS": ("learn/swav", [f"model.neck.{BN}", "model.freeze_prototypes_iters=1", *RESNET, *LARS]),
    "BYOL, ResNet, LARS": ("learn/byol", [f"model.neck.{BN}", f"model.head.predictor.{BN}", *RESNET, *LARS]),
    "MoCo v3, ViT, AdamW": (
        "learn/mocov3",
        [f"model.neck.{BN}", f"model.head.predictor.{BN}", f"model.backbone={VIT}", "model.neck.in_channels=32"],
    ),
}


def case(method: str, cut: tuple[int, int]) -> str:
    return f"{method}, {cut[0]} x {cut[1]}"


CASES = [case(method, cut) for method in METHODS for cut in CUTS]


class Trained(NamedTuple):
    """What a run wrote: of each step, the loss and the norm of the gradient; at its end, weights and buffers."""

    rows: list[dict[str, float]]
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]


def command(folder: Path, method: str, ranks: int, micro_batch: int, stage: int) -> list[str]:
    """The command line of a run, whose recipe it writes."""
    name, settings = METHODS[method]
    place = folder / f"{name}-{ranks}-{micro_batch}-{stage}"
    place.mkdir(parents=True)
    values = {"configs": ROOT / "configs", "name": name, "batch": BATCH, "group": GROUP}
    text = RECIPE.format(**values, folder=place, shapes=folder / "shapes", micro_batch=micro_batch)
    (place / "step.toml").write_text(text)
    settings = [*settings, f"max_iters={STEPS}", 'engine.precision="fp32"', f"engine.zero_stage={stage}"]
    return [str(place / "step.toml"), *(word for setting in settings for word in ("--set", setting))]


def result(words: list[str], parameters: set[str]) -> Trained:
    run = Path(words[0]).with_suffix("")
    rows = [row for row in small_run.metrics(run) if "train/loss" in row]
    assert len(rows) == STEPS
    state = checkpoint.load(small_run.saved(run, STEPS))[0]["model"]
    weights = {name: tensor.double() for name, tensor in state.items() if name in parameters}
    return Trained(rows, weights, {name: tensor for name, tensor in state.items() if name not in parameters})


def initial_weights(words: list[str]) -> dict[str, Tensor]:
    model = session.build(load(Path(words[0]), words[2::2])).model
    return {name: parameter.detach().double() for name, parameter in model.named_parameters()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The Euclidean distance between all numbers of two states."""
    assert one.keys() == other.keys()
    return sum((one[name] - other[name]).square().sum().item() for name in one) ** 0.5


def differences(one: Trained, other: Trained, initial: dict[str, Tensor]) -> dict[str, float]:
    """Relative differences: the greatest of all steps; of weights, relative to the way that they went."""
    losses, norms = (
        [abs(a[key] / b[key] - 1) for a, b in zip(one.rows, other.rows, strict=True)]
        for key in ("train/loss", "train/grad_norm")
    )
    floats = {name: buffer.double() for name, buffer in other.buffers.items() if buffer.is_floating_point()}
    assert all(torch.equal(one.buffers[n], other.buffers[n]) for n in other.buffers.keys() - floats.keys())
    size = distance(floats, {name: torch.zeros_like(buffer) for name, buffer in floats.items()})
    return {
        "loss": max(losses),
        "first gradient": norms[0],
        "gradients": max(norms),
        "weights": distance(one.weights, other.weights) / distance(other.weights, initial),
        "buffers": distance({name: one.buffers[name].double() for name in floats}, floats) / size if floats else 0.0,
    }


def greatest(several: list[dict[str, float]]) -> dict[str, float]:
    return {quantity: max(each[quantity] for each in several) for quantity in TOLERANCE}


@pytest.mark.nightly
@pytest.mark.parametrize("ranks", sorted({ranks for ranks, _ in CUTS}))
def test_every_stage_trains_as_one_process(tmp_path: Path, ranks: int) -> None:
    cuts = [cut for cut in CUTS if cut[0] == ranks]
    alone = {method: command(tmp_path, method, 1, BATCH, 0) for method in METHODS}
    several = {
        (method, cut, stage): command(tmp_path, method, *cut, stage)
        for method in METHODS
        for cut in cuts
        for stage in STAGES
    }
    run_ranks(train_all, 1, list(alone.values()), timeout_s=1800)
    first, *others = run_ranks(train_all, ranks, list(several.values()), timeout_s=1800)
    assert all(other == first for other in others), "ranks differ in what they have in common"
    rows = []
    for method in METHODS:
        initial = initial_weights(alone[method])
        one = result(alone[method], set(initial))
        for cut in cuts:
            stages = [result(several[method, cut, stage], set(initial)) for stage in STAGES]
            of_stages = [differences(stage, one, initial) for stage in stages]
            against_0 = greatest([differences(stage, stages[0], initial) for stage in stages[1:]])
            rows.append({KEY: case(method, cut), "stages": of_stages, "against stage 0": against_0})
    for row in rows if tables.is_writing() else []:
        tables.replace(ROWS, KEY, CASES, row)
    for row in rows:
        assert_within(row)


def assert_within(row: tables.Row) -> None:
    for each in (*row["stages"], row["against stage 0"]):
        assert all(each[quantity] < tolerance for quantity, tolerance in TOLERANCE.items()), (row[KEY], each)


def test_the_table_is_that_of_the_rows() -> None:
    rows = tables.rows(ROWS)
    assert [row[KEY] for row in rows] == CASES
    for row in rows:
        assert_within(row)
    tables.check(PAGE, "stages", lines)


def lines() -> list[str]:
    heads = ["method, network, optimizer, ranks x samples", *(f"stage {stage}" for stage in STAGES), "1 to 3 against 0"]
    table = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in tables.rows(ROWS):
        cells = [" ".join(f"{each[q]:.0e}" for q in TOLERANCE) for each in (*row["stages"], row["against stage 0"])]
        table.append(f"| {row[KEY]} | {' | '.join(cells)} |")
    return table
