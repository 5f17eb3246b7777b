"""TF32, cuDNN's benchmark and exactness on CUDA: which switches are set, when, and what of it is recorded."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import small_run
from sslrun import run_parts, session
from sslrun.cli import main
from sslrun.config import load
from sslrun.errors import UsageError
from sslrun.evaluation import knn, probe
from sslrun.plan import choose_machine, describe, make_plan
from sslrun.recipe import EngineConfig
from sslrun.runtime.numerics import CUBLAS_WORKSPACE, fix_cublas_workspaces, set_numerics
from sslrun.session import build
from test_plan import MACHINE, recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def switches() -> dict[str, object]:
    return {
        "matmul": torch.backends.cuda.matmul.allow_tf32,
        "conv": torch.backends.cudnn.allow_tf32,
        "benchmark": torch.backends.cudnn.benchmark,
        "cudnn": torch.backends.cudnn.deterministic,
        "torch": torch.are_deterministic_algorithms_enabled(),
        "inductor": torch._inductor.config.deterministic,
        "workspace": os.environ.get(CUBLAS_WORKSPACE),
    }


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch):
    """No other test sees the switches of this one."""
    monkeypatch.setenv(CUBLAS_WORKSPACE, "")  # which restores it in the end, too
    monkeypatch.delenv(CUBLAS_WORKSPACE)
    before = switches()
    yield
    torch.use_deterministic_algorithms(before["torch"])
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before["matmul"], before["conv"]
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before["benchmark"], before["cudnn"]


def test_switches_of_a_fast_run_and_back():
    set_numerics(CUDA, tf32=True, cudnn_benchmark=True, deterministic=False)
    fast = {"matmul": True, "conv": True, "benchmark": True}
    exact = {"cudnn": False, "torch": False, "inductor": False, "workspace": None}
    assert switches() == fast | exact
    set_numerics(CUDA, tf32=False, cudnn_benchmark=False, deterministic=False)
    assert switches() == dict.fromkeys(fast, False) | exact


def test_switches_of_an_exact_run():
    set_numerics(CUDA, tf32=True, cudnn_benchmark=False, deterministic=True)
    exact = {"benchmark": False, "cudnn": True, "torch": True, "inductor": True, "workspace": ":4096:8"}
    assert switches() == {"matmul": True, "conv": True} | exact
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))  # one that has no exact form on the CPU either


def test_the_cpu_is_left_alone():
    before = switches()
    set_numerics(CPU, tf32=True, cudnn_benchmark=True, deterministic=True)
    assert switches() == before


@pytest.mark.parametrize("is_on", [True, False])
def test_measurements_are_in_full_float32(monkeypatch, is_on):
    rows, classes, seen = torch.randn(20, 4), torch.arange(20) % 3, []

    def look(*arguments: Any, **options: Any) -> Any:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return product(*arguments, **options)

    set_numerics(CUDA, tf32=is_on, cudnn_benchmark=True, deterministic=False)
    for measure, module in (
        (lambda: knn.knn_top1(rows, classes, rows, classes), knn),
        (lambda: knn.nearest(rows, rows, 3), knn),
        (lambda: probe.linear_probe(rows, classes, rows, classes, CPU), probe),
    ):
        name = "fit" if module is probe else "unit_rows"
        product = getattr(module, name)
        monkeypatch.setattr(module, name, look)
        seen.clear()
        measure()
        assert seen and not any(seen)
        assert torch.backends.cuda.matmul.allow_tf32 is is_on
        monkeypatch.undo()


@pytest.mark.parametrize(("found", "left"), [(":16:8", ":16:8"), (":4096:8", ":4096:8"), (":4096:2:16:8", ":4096:8")])
def test_a_users_workspaces_stay_if_they_are_exact(monkeypatch, found, left):
    monkeypatch.setenv(CUBLAS_WORKSPACE, found)
    fix_cublas_workspaces()
    assert os.environ[CUBLAS_WORKSPACE] == left


@pytest.mark.parametrize(
    ("changes", "tf32", "benchmark"),
    [
        ({"precision": "bf16"}, True, True),
        ({"precision": "fp32"}, False, True),
        ({"precision": "fp32", "tf32": "on"}, True, True),
        ({"precision": "bf16", "tf32": "off"}, False, True),
        ({"precision": "bf16", "cudnn_benchmark": "off"}, True, False),
        ({"precision": "bf16", "deterministic": True}, True, False),
    ],
)
def test_what_a_machine_chooses(changes, tf32, benchmark):
    chosen = choose_machine(recipe(micro_batch=8, **changes), CUDA, 1, 1)
    assert (chosen.tf32, chosen.cudnn_benchmark) == (tf32, benchmark)
    assert chosen.deterministic is changes.get("deterministic", False)
    on_cpu = choose_machine(recipe(micro_batch=8, **changes), CPU, 1, 1)
    assert not on_cpu.tf32 and not on_cpu.cudnn_benchmark


def test_a_resume_keeps_its_products_unless_the_recipe_says_otherwise():
    before = {"precision": "bf16", "tf32": False}
    assert not choose_machine(recipe(micro_batch=8), CUDA, 1, 1, before).tf32
    assert choose_machine(recipe(micro_batch=8, tf32="on"), CUDA, 1, 1, before).tf32
    assert not choose_machine(recipe(micro_batch=8, precision="fp32"), CUDA, 1, 1, before | {"tf32": True}).tf32


def test_the_plan_shows_them():
    tried = build(load(str(small_run.ROOT / "configs/learn/mocov1.toml"), ["engine.deterministic=true"]))
    chosen = {"precision": "bf16", "compile": True, "micro_batch": 32, "tf32": True, "deterministic": True}
    lines = {}
    for device in ("cuda", "cpu"):
        machine = replace(MACHINE, device=device, **chosen)
        text = describe(tried, make_plan(tried, 100, machine, 1), [0], "")
        lines[device] = {line[:13].strip(): line[13:] for line in text.splitlines()}
    switches = "tf32 on, cudnn_benchmark off, deterministic on, cuda_graphs off"
    assert lines["cuda"]["machine"] == f"cuda, bf16, compile on, 1 threads, {switches}"
    assert lines["cuda"]["CUDA graphs"].startswith("not used: the gradients of 2 micro-batches are held at once")
    assert lines["cpu"]["machine"] == "cpu, bf16, compile on, 1 threads" and "CUDA graphs" not in lines["cpu"]


def test_an_exact_run_times_no_algorithms():
    with pytest.raises(UsageError, match=r"engine.deterministic is set, and engine.cudnn_benchmark = \"on\""):
        EngineConfig(deterministic=True, cudnn_benchmark="on")


def test_a_run_sets_and_records_them(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch):
    """The workspaces before the device is touched; the rest before the networks are on it."""
    happened: list[object] = []
    init, numerics, executor = session.distributed.init, session.set_numerics, run_parts.LocalExecutor
    monkeypatch.setattr(session.distributed, "init", lambda *a: (happened.append(switches()), init(*a)))
    monkeypatch.setattr(session, "set_numerics", lambda d, **asked: (happened.append(asked), numerics(d, **asked)))
    monkeypatch.setattr(run_parts, "LocalExecutor", lambda *a, **k: (happened.append("executor"), executor(*a, **k))[1])
    path = small_run.write_recipe(tmp_path, images, steps=2)
    options = ["--set=engine.deterministic=true", "--set=monitor.knn_interval=0"]
    assert main([str(path), *options, "--set=max_iters=1"]) == 0
    asked = {"tf32": False, "cudnn_benchmark": False, "deterministic": True}
    assert happened[0]["workspace"] == ":4096:8" and happened[1:] == [asked, "executor"]
    recorded = json.loads((tmp_path / "runs/small/machine.json").read_text())["cpu x 1"]
    assert recorded == recorded | asked | {"cuda_graphs": False}
    changed = ["engine.deterministic=false", "engine.tf32=on", "engine.cuda_graphs=off", "engine.cudnn_benchmark=off"]
    assert main([str(path), "--resume", *(f"--set={each}" for each in changed), options[1]]) == 0
