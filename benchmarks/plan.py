"""Compares `sslrun plan` with measurements, and writes the tables of docs/scaling.md.

    python benchmarks/plan.py time          steps on this CPU: measured and estimated in turn, three times
    python benchmarks/plan.py memory        the allocator's peak of a step on this CPU, and the estimate
    python benchmarks/plan.py published     least times of steps that others have measured on GPUs
    python benchmarks/plan.py scaling       8 to 512 GPUs
    python benchmarks/plan.py table         only write the tables

A row in results/plan.jsonl replaces the older one of the same case.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("engine", "kernels", "benchmarks")]

import torch
from dino_like import dino_like
from engine_step import engine_step
from rows import RESULTS, about

from sslrun.capacity import Estimate, cluster_of, communication, estimate, estimation, hardware, sized, work
from sslrun.config import load
from sslrun.recipe import Recipe

CPU = torch.device("cpu")
DOCUMENT = ROOT / "docs/scaling.md"
CONFIGS, SELFSUP = "configs", "configs/selfsup"
MOCOV2 = f"{SELFSUP}/mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k.toml"
# Recipes for this CPU: the batch is small enough for a step of a second or so.
LOCAL = ("engine.device=cpu", "engine.threads=1")
HERE = {
    "mocov2 ResNet-18, 96 px": ("configs/small/mocov2_resnet18_96px.toml", ("global_batch=32", *LOCAL)),
    "mocov3 ViT-S/8, 96 px": (
        "configs/small/mocov3_vit-small_96px.toml",
        ("global_batch=8", "data.samples_per_gpu=8", *LOCAL),
    ),
    "simclr ResNet-18, 96 px, 2 accumulated": (
        "configs/small/simclr_resnet18_96px.toml",
        ("global_batch=32", "data.samples_per_gpu=16", "engine.micro_batch=16", "engine.split_sync_bn=true", *LOCAL),
    ),
}
# Images per second and GPU that others measured in PyTorch's training steps, with mixed precision and without a
# compiler: network, images at once, GPU, images per second, source.
PUBLISHED = [
    ("resnet50", 256, "a100", 2470, "NVIDIA DeepLearningExamples, PyTorch ResNet-50, NGC 21.03"),
    ("resnet50", 512, "a100", 2550, "pytorch-image-models, issue 1491 (2,500 to 2,600)"),
    ("vit-small", 512, "h200", 5367, "stable-pretraining, RESULTS.md, forward and backward pass"),
    ("vit-large", 768, "h200", 824, "stable-pretraining, RESULTS.md, 412 pairs of views, which the GPU also makes"),
]
# Not used for the share, since they are another kind of code: to see what is left.
OTHERS = [
    ("resnet50", 400, "h100", 7159, "MLPerf Training v4.0, NVIDIA: MXNet with fused kernels"),
    ("dino-like vit-large", 64, "h100", 112, "DINOv3, its ViT-L run on 32 GPUs, 2,048 images in 0.57 s, with iBOT"),
]
DINO = ("optimizer={ _delete_ = true, type = 'AdamW', lr = 0.001, weight_decay = 0.04 }",)
SIZES = (8, 16, 32, 64, 128, 256, 512)
GPU_OF_THE_TABLE = "h100"
FUNCTIONS = estimation.rehearse, work.count, communication.of_method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("time", "memory", "published", "scaling", "table"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=list(HERE), default=list(HERE), help="of time and memory")
    args = parser.parse_args()
    for part in args.parts:
        if part == "time":
            for case in args.cases:
                put({**timed_row(case, args.rounds), "environment": about()})
        elif part != "table":
            for row in map(memory_row, args.cases) if part == "memory" else PARTS[part]():
                put({"benchmark": part, **row})
    write_tables()


def put(row: dict[str, Any]) -> None:
    """Writes a row in the place of that of the same case."""

    def case(row: dict[str, Any]) -> list[Any]:
        names = ("case", "recipe", "network", "gpu", "gpus", "samples", "images_per_s" * ("network" in row))
        return [row["benchmark"], *(row.get(name) for name in names)]

    print(json.dumps(row), flush=True)
    rows = read_rows()
    places = [place for place, old in enumerate(rows) if case(old) == case(row)]
    rows[slice(places[0], places[0] + 1) if places else slice(len(rows), None)] = [row]
    (RESULTS / "plan.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def read_rows() -> list[dict[str, Any]]:
    """The committed rows."""
    file = RESULTS / "plan.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def timed_row(case: str, rounds: int) -> dict[str, Any]:
    """A step measured and estimated in turn; the median of the ratios, and all of them.

    Seconds are those of the processor, in one thread, which other work on the machine disturbs least.
    """
    file, settings = HERE[case]
    config = load(str(ROOT / file), list(settings))
    step, cluster = engine_step(config, CPU, 5000), cluster_of("cpu", 1, 1)
    recipe, _ = sized(config, 5000)
    hardware.clock = time.process_time
    estimation.rehearse, work.count = map(remembered, FUNCTIONS[:2])
    step()
    rows = []
    for _ in range(rounds):
        before = processor_s(step)
        estimated = estimate(recipe, 5000, cluster).compute_s
        rows.append((estimated, statistics.mean([before, processor_s(step)])))
    ratios = [estimated / measured for estimated, measured in rows]
    return {
        "benchmark": "time",
        "case": case,
        "settings": list(settings),
        "measured_s": [round(measured, 3) for _, measured in rows],
        "estimated_s": [round(estimated, 3) for estimated, _ in rows],
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
        "load": round(os.getloadavg()[0], 1),
    }


def processor_s(step: Callable[[], None]) -> float:
    begin = time.process_time()
    step()
    return time.process_time() - begin


def memory_row(case: str) -> dict[str, Any]:
    """The largest memory that torch's allocator held in a step, and the estimate of it."""
    file, settings = HERE[case]
    config = load(str(ROOT / file), list(settings))
    step = engine_step(config, CPU, 5000)
    step()  # makes the optimizer's state
    method = step.recipe.model
    state = [value for values in step.executor.optimizer.state.values() for value in values.values()]
    images = [view for batch in step.batches for view in batch.views]
    held = sum(t.nbytes for t in (*method.parameters(), *method.buffers(), *state, *images) if torch.is_tensor(t))
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    now = peak = held
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    recipe, _ = sized(config, 5000)
    expected = estimate_of_memory(recipe)
    return {
        "case": case,
        "measured_mib": round(peak / 2**20, 1),
        "estimated_mib": round(expected / 2**20, 1),
        "ratio": round(expected / peak, 3),
    }


def estimate_of_memory(recipe: Recipe) -> float:
    """Bytes, as `sslrun plan --gpu cpu` has them, without timing anything."""
    timed_here, hardware.seconds_here = hardware.seconds_here, lambda step, threads: dict.fromkeys(step, 0.0)
    try:
        return estimate(recipe, 5000, cluster_of("cpu", 1, 1)).memory.total
    finally:
        hardware.seconds_here = timed_here


def published_rows() -> Iterator[dict[str, Any]]:
    for network, samples, gpu, measured, source in (*PUBLISHED, *OTHERS):
        counted = work_of(network, samples)
        least = hardware.GPUS[gpu].least_seconds(counted)
        yield {
            "network": network,
            "samples": samples,
            "gpu": gpu,
            "images_per_s": measured,
            "at_most": round(samples / least),
            "share": round(measured * least / samples, 3),
            "tflop": round(sum(op.flops * n for op, n in counted.items()) / 1e12, 2),
            "is_used": (network, samples, gpu, measured, source) in PUBLISHED,
            "source": source,
        }


def work_of(network: str, samples: int) -> work.Work:
    """The work of a step of one rank in bfloat16: supervised, of the network and size that others measured."""
    batch = [f"data.samples_per_gpu={samples}", f"global_batch={samples}"]
    if network.startswith("dino"):
        recipe = dino_like(sized(load(str(ROOT / "configs/swav.toml"), [*DINO, *batch]))[0], network.rpartition("-")[2])
        return work.count(recipe, "bf16", torch.bfloat16, 1)
    kind, _, arch = network.partition("-")
    backbone = f"type = 'VisionTransformer', arch = '{arch}'" if kind == "vit" else "type = 'ResNet', depth = 50"
    views = "{ num_views = 1, transforms = [{ type = 'RandomResizedCrop', size = 224 }, { type = 'Normalize' }] }"
    settings = [
        f"model={{ _delete_ = true, type = 'Supervised', num_classes = 1000, backbone = {{ {backbone} }} }}",
        f"data.views=[{views}]",
        "monitor.loss_interval=0",
        *batch,
    ]
    return work.count(sized(load(str(ROOT / MOCOV2), settings))[0], "bf16", torch.bfloat16, 1)


def scaling_rows() -> Iterator[dict[str, Any]]:
    cases = {
        "MoCo v2 ResNet-50, 32 images per GPU": mocov2(32),
        "DINO-like ViT-L/16, batch 2,048": dino(2048),
        "MoCo v2 ResNet-50, 128 images per GPU": mocov2(128),
    }
    for name, recipe in cases.items():
        estimation.rehearse, work.count, communication.of_method = map(remembered, FUNCTIONS)
        if name.startswith("DINO"):
            communication.of_method = lambda *_: Counter()  # it calls none
        for gpus in SIZES:
            if "per GPU" in name:
                recipe.global_batch = recipe.data.samples_per_gpu * gpus
            found = estimate(recipe, 1_281_167, cluster_of(GPU_OF_THE_TABLE, gpus, max(1, gpus // 8)))
            yield scaling_row(name, gpus, found)


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which keeps its results by all arguments but the recipe: what it counts is that of a micro-batch,
    whatever the global batch."""
    found: dict[Any, Any] = {}

    def call(recipe: Recipe, *args: Any) -> Any:
        if args not in found:
            found[args] = function(recipe, *args)
        return found[args]

    return call


def mocov2(samples: int) -> Recipe:
    """MoCo v2 with one BatchNorm group of so many images on each GPU."""
    settings = [f"data.samples_per_gpu={samples}", f"global_batch={samples}", "engine.zero_stage=0"]
    return sized(load(str(ROOT / MOCOV2), settings))[0]


def dino(batch: int) -> Recipe:
    """100 epochs at one global batch. There is no BatchNorm, so a group can be as small as it has to be."""
    settings = [*DINO, "data.samples_per_gpu=4", f"global_batch={batch}", "epochs=100"]
    return dino_like(sized(load(str(ROOT / "configs/swav.toml"), settings))[0], "large")


def scaling_row(name: str, gpus: int, found: Estimate) -> dict[str, Any]:
    sent = Counter[str]()
    for each in found.sent.values():
        sent["link"] += round(each.link / 1e6)
        sent["network"] += round(each.network / 1e6)
    return {
        "recipe": name,
        "gpu": GPU_OF_THE_TABLE,
        "gpus": gpus,
        "global_batch": found.global_batch,
        "cut": f"{found.accumulation} x {found.micro_batch}",
        "memory_gib": round(found.memory.total / 2**30, 1),
        "step_ms": round(1e3 * found.step_s, 1),
        "communication_ms": round(1e3 * found.communication_s, 2),
        "mb_in_node": sent["link"],
        "mb_between_nodes": sent["network"],
        "images_per_s": round(found.images_per_s),
        "epochs": round(found.epochs),
        "hours": round(24 * found.days, 2),
        "is_loader_bound": found.loader_s > found.compute_s + found.communication_s,
    }


def write_tables() -> None:
    """Writes the tables between their marks in the document."""
    rows, text = read_rows(), DOCUMENT.read_text(encoding="utf-8")
    tables = {"scaling": scaling_table, "published": published_table, "time": time_table, "memory": memory_table}
    for name, table in tables.items():
        start, end = f"<!-- table: {name}, by benchmarks/plan.py -->", f"<!-- end of table: {name} -->"
        before, after = text[: text.index(start) + len(start)], text[text.index(end) :]
        lines = table([row for row in rows if row["benchmark"] == name])
        text = "\n".join([before, "", *lines, "", after])
    DOCUMENT.write_text(text, encoding="utf-8")


def scaling_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == recipe]
        first = own[0]
        lines += [
            *([""] if lines else []),
            f"**{recipe}**, {first['epochs']} epochs of ImageNet, on {first['gpu'].upper()}s, 8 in each node:",
            "",
            "| GPUs | global batch | per GPU | GiB | step, ms | of it sending | MB in the node | MB between nodes | "
            "images/s | efficiency | hours |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in own:
            efficiency = row["images_per_s"] / row["gpus"] / (first["images_per_s"] / first["gpus"])
            lines.append(
                f"| {row['gpus']} | {row['global_batch']:,} | {row['cut']} | {row['memory_gib']:.1f} | "
                f"{row['step_ms']:.1f}{' (loaders)' if row['is_loader_bound'] else ''} | "
                f"{row['communication_ms']:.1f} | {row['mb_in_node']:,} | {row['mb_between_nodes']:,} | "
                f"{row['images_per_s']:,} | {efficiency:.0%} | {row['hours']:.2f} |"
            )
    return lines


def published_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| step | samples | GPU | measured, images/s | at most by the data sheet | share | source |",
        "|---|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {row['network']} | {row['samples']} | {row['gpu'].upper()} | {row['images_per_s']:,} | "
        f"{row['at_most']:,} | {row['share']:.0%}{'' if row['is_used'] else ' (not used)'} | {row['source']} |"
        for row in rows
    ]


def time_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| step | measured, s | estimated, s | estimated / measured | load |", "|---|---|---|---|---|"]
    return lines + [
        f"| {row['case']} | {statistics.median(row['measured_s']):.2f} | {statistics.median(row['estimated_s']):.2f} | "
        f"{', '.join(f'{ratio:.2f}' for ratio in row['ratios'])} | {row['load']} |"
        for row in rows
    ]


def memory_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| step | measured, MiB | estimated, MiB | estimated / measured |", "|---|---|---|---|"]
    return lines + [
        f"| {row['case']} | {row['measured_mib']:,} | {row['estimated_mib']:,} | {row['ratio']:.2f} |" for row in rows
    ]


PARTS = {"published": published_rows, "scaling": scaling_rows}

if __name__ == "__main__":
    main()
