"""`sslrun plan`: counted work, communication by hand, memory against the allocator, one line for what cannot be."""

import importlib.util
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sslrun import cli
from sslrun.capacity import cluster_of, estimate, estimation, hardware, sized, work
from sslrun.capacity.communication import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, Collective, of_method, of_zero, sent
from sslrun.commands import plan as verb
from sslrun.config import load
from sslrun.errors import UsageError

ROOT = Path(__file__).parents[1]
SMALL = str(ROOT / "configs/small/mocov2_resnet18_96px.toml")
MOCOV2 = str(ROOT / "configs/mocov2.toml")
H100 = hardware.GPUS["h100"]


def recipe_of(*settings: str, file: str = SMALL):
    return sized(load(file, list(settings)), 5000)[0]


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("plan_benchmark", ROOT / "benchmarks/plan.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_flop_of_a_resnet_are_those_of_the_literature():
    """ResNet-18 has 1.814 GFLOP (multiply-adds) for an image of 224 px (He et al. 2016); at 96 px (96 / 224)^2 of it,
    but for the classifier. MoCo runs it twice forward and once backward, which is 4 forward passes' work, without the
    gradient of the images."""
    counted = work.count(recipe_of("data.samples_per_gpu=4", "global_batch=4"), "fp32", torch.float32, 1)
    flops = sum(operation.flops * times for operation, times in counted.items())
    forward = 2 * 1.814e9 * (96 / 224) ** 2 * 4
    assert 3.8 < flops / forward < 4.05


def test_counts_are_those_of_a_rehearsal_on_the_gpu():
    """benchmarks/results/rehearsal.jsonl counts a whole step of MoCo v2 on fake CUDA tensors, by other code."""
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/rehearsal.jsonl").read_text().splitlines()]
    row = next(row for row in rows if (row["case"], row["size"]) == ("mocov2", "short"))
    counted = work.count(recipe_of(file=MOCOV2), "bf16", torch.bfloat16, 2)
    assert sum(each.flops * times for each, times in counted.items()) / 1e12 == pytest.approx(row["tflop"], rel=0.01)
    assert sum(each.bytes * times for each, times in counted.items()) / 1e9 == pytest.approx(row["gbytes"], rel=0.05)


def test_an_operation_takes_the_longest_of_three_times():
    one = next(iter(work.count(recipe_of("data.samples_per_gpu=2", "global_batch=2"), "fp32", torch.float32, 1)))
    by_flop = replace(one, flops=10**15, bytes=1, launches=1, dtype=torch.bfloat16)
    assert H100.least_seconds(Counter({by_flop: 2})) == pytest.approx(2e15 / 989e12)
    assert H100.least_seconds(Counter({replace(one, flops=1, bytes=10**12, launches=1): 1})) == pytest.approx(1 / 3.35)
    assert H100.least_seconds(Counter({replace(one, flops=1, bytes=1, launches=3): 1})) == pytest.approx(6e-6)


def test_bytes_of_collectives_by_hand():
    reduced = sent(Counter({Collective(ALL_REDUCE, 800, ""): 1}), H100, 16, 2)
    assert (reduced.link, reduced.network) == (2 * 800 * 7 / 8, 2 * 800 / 8 / 2)
    gathered = sent(Counter({Collective(ALL_GATHER, 800, ""): 3}), H100, 8, 1)
    assert (gathered.link, gathered.network) == (3 * 800 * 7 / 8, 0)
    exchanged = sent(Counter({Collective(ALL_TO_ALL, 1600, ""): 1}), H100, 16, 2)
    assert (exchanged.link, exchanged.network) == (700, 800)
    assert exchanged.seconds == pytest.approx((700 / 450e9 + 800 / 50e9) / 0.8 + 40e-6)


def test_what_deepspeed_sends():
    def size(stage: int) -> int:
        return sum(each.bytes * times for each, times in of_zero(stage, 100, 60, 4).items())

    assert [size(stage) for stage in range(4)] == [100, 200, 500, 400 + 4 * 160]


def test_collectives_of_a_method_are_those_of_its_code():
    """MoCo sends each image to another rank for its keys, and each key back; BatchNorm groups need nothing."""
    heard = of_method(recipe_of("data.samples_per_gpu=4", "global_batch=32"), "bf16", torch.bfloat16, 1, 8)
    assert Counter({(each.kind, each.bytes): times for each, times in heard.items()}) == Counter(
        {(ALL_TO_ALL, 4 * 3 * 96 * 96 * 2): 1, (ALL_TO_ALL, 4 * 128 * 4): 1}
    )


@pytest.mark.parametrize(("stage", "parts"), [(0, (1, 1, 1)), (1, (1, 1.25, 1 / 4)), (2, (1, 1 / 4, 1 / 4))])
def test_shards_of_four_ranks(stage, parts):
    """Shares of weights, gradients and optimizer state; beside them a bucket, and the master copy from stage 1 on."""
    recipe = recipe_of("data.samples_per_gpu=4", "global_batch=16")
    rehearsed = estimation.rehearse(recipe, "fp32", torch.float32)
    trained = sum(p.nbytes for p in recipe.model.parameters() if p.requires_grad)
    held = estimation.memory_of_rank(recipe, rehearsed, 4, 4, stage, 4, math.inf)
    assert held.weights == parts[0] * rehearsed.weights
    assert held.gradients == parts[1] * trained + min(trained, estimation.BUCKET)
    assert held.optimizer == parts[2] * rehearsed.optimizer + (trained / 4 if stage else 0)


@pytest.mark.nightly
def test_the_batch_is_cut_as_a_run_would_cut_it():
    recipe = recipe_of("global_batch=4096", file=MOCOV2)
    found = estimate(recipe, 1_281_167, cluster_of("a100", 8, 1))
    assert found.micro_batch * found.accumulation * 8 == 4096
    assert found.memory.total <= found.memory.available
    assert found.total_steps == 200 * (1_281_167 // 4096)
    assert found.days == pytest.approx(found.total_steps * found.step_s / 86400)


def test_more_memory_than_there_is_says_what_would_fit():
    recipe = recipe_of("global_batch=128")
    rehearsed = estimation.rehearse(recipe, "bf16", torch.bfloat16)
    enough = rehearsed.total(4, 1) - rehearsed.activations / 2
    tiny = replace(H100, memory_gib=enough / estimation.MEMORY_SHARE / 2**30)
    with pytest.raises(
        UsageError, match=r"a micro-batch of 32 needs .* GiB per GPU, .* 1[56] samples at once would fit"
    ):
        estimate(recipe, 5000, replace(cluster_of("h100", 1, 1), gpu=tiny))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "h300"), "h300"),
        (("--gpus", "12", "--nodes", "5"), "--gpus 12 cannot be divided among --nodes 5"),
        (("--gpus", "64"), "possible numbers of processes: 1, 2, 4"),
        (("--samples", "100"), "100 images are fewer than one global_batch of 128"),
        (("--gpus", "x"), "expected a number from 1"),
        (("--gpu", "cpu", "--gpus", "2"), "one process"),
    ],
)
def test_what_cannot_be_is_one_line(capsys, arguments, message):
    try:
        code = cli.main(["plan", SMALL, *(() if "--samples" in arguments else ("--samples", "5000")), *arguments])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_the_text_begins_with_the_answer_and_names_what_limits(capsys):
    assert cli.main(["plan", SMALL, "--gpus", "4", "--samples", "50000"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert "days" in first and "4 x H100" in first and "images/s" in first and "GiB" in first
    assert {"batch", "memory", "step", "limits", "helps", "assumed"} <= {line.split()[0] for line in rest}


def test_the_verb_knows_all_hardware():
    assert sorted(verb.GPUS) == sorted((*hardware.GPUS, hardware.CPU))


@pytest.mark.nightly
@pytest.mark.parametrize("case", range(3))
def test_memory_is_that_of_the_allocator(script, case):
    row = script.memory_row(list(script.HERE)[case])
    assert row["ratio"] == pytest.approx(1.0, abs=0.1)


def test_committed_estimates_are_close_to_what_was_measured(script):
    rows = script.read_rows()
    times = [row for row in rows if row["benchmark"] == "time"]
    memory = [row for row in rows if row["benchmark"] == "memory"]
    assert {row["case"] for row in times} == {row["case"] for row in memory} == set(script.HERE)
    assert all(row["ratio"] == pytest.approx(1.0, abs=0.2) for row in times)
    assert all(row["ratio"] == pytest.approx(1.0, abs=0.1) for row in memory)


def test_the_document_has_the_tables_of_the_rows(script, tmp_path, monkeypatch):
    copy = tmp_path / "scaling.md"
    copy.write_text(script.DOCUMENT.read_text())
    monkeypatch.setattr(script, "DOCUMENT", copy)
    script.write_tables()
    assert copy.read_text() == (ROOT / "docs/scaling.md").read_text()


def test_the_share_is_within_what_was_published(script):
    shares = [row["share"] for row in script.read_rows() if row["benchmark"] == "published" and row["is_used"]]
    assert len(shares) >= 3
    assert min(shares) <= hardware.SHARE <= max(shares)
    assert min(shares) + 0.01 >= hardware.LEAST_SHARE
    assert max(shares) - 0.01 <= hardware.MOST_SHARE
