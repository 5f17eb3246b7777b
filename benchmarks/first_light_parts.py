"""The parts of first_light.py. It starts one process of this file for each part; see there.

A part is a list of items and a function that measures one. A row has a `summary`, a line for the console, beside its
figures. A failure ends the process, since a failed GPU may be unusable in it; it is started again for what is left.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("engine", "kernels", "benchmarks", "tests")]

import numpy as np
import torch
from engine_step import engine_step, host_s, measure, tera_operations, timed
from rows import about, append_row, quantiles

from sslrun.config import load
from sslrun.data import dali
from sslrun.data.exact import ExactStage
from sslrun.data.graph import view_arguments
from sslrun.data.views import ViewGroup
from sslrun.plan import cuda_graphs_note
from sslrun.session import build

MOCO, VIT = "mocov2", "selfsup/mocov3/mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k"
MODES = {
    "eager": ["engine.compile=off", "engine.cuda_graphs=off"],
    "compiled": ["engine.compile=on", "engine.cuda_graphs=off"],
    "graphs": ["engine.compile=on", "engine.cuda_graphs=on"],
}
WORK: dict[tuple[str, int], float] = {}  # 10^12 operations of a recipe's step at a batch
SOME_TESTS_FAILED = 1  # pytest's exit codes
NO_TESTS = 5


class Skipped(Exception):
    """What the item needs is not here; the message says what, and how to get it."""


@dataclass(frozen=True)
class Lab:
    """What the parts need to know.

    Attributes:
        device: to measure on.
        tiny: whether everything is as small as it gets, to test these files.
        folder: for files that are not kept.
        limit_s: seconds for an item.
        end: `time.monotonic` of the end of everything.
    """

    device: torch.device
    tiny: bool
    folder: Path
    limit_s: float
    end: float

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        """For an item that begins now, a few seconds before it would be killed."""
        return max(1.0, min(self.limit_s, self.end - time.monotonic()) - 5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", required=True, help="name of the run that the rows belong to")
    parser.add_argument("--mark", type=Path, required=True, help="file that names the item under way")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--end", type=float, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)  # where CUDA graphs are left out, and why
    lab = Lab(device, args.tiny, args.folder, args.limit, args.end)
    if lab.tiny:
        torch.set_num_threads(1)
        torch.compiler.set_stance("force_eager")  # what compiles is Inductor's business, and takes minutes
    items, run_item = PARTS[args.part]
    for item in items(lab):
        row = {"benchmark": "first_light", "run": args.run, "part": args.part, "item": item}
        if is_done(args.out / "first_light.jsonl", row):
            continue
        beside = args.mark.with_suffix(".new")
        beside.write_text(item)
        os.replace(beside, args.mark)
        print(f"--- {item}", flush=True)
        begin = time.perf_counter()
        try:
            row |= {"status": "done", **run_item(lab, item)}
        except Skipped as reason:
            row |= {"status": "skipped", "reason": str(reason)}
        except Exception as error:
            traceback.print_exc()
            row |= {"status": "failed", "error": traceback.format_exception_only(error)[0].splitlines()[0][:300]}
        append_row("first_light", {**row, "seconds": round(time.perf_counter() - begin, 1)}, args.out)
        if row["status"] == "failed":
            return 1
        clean_up(lab)
    return 0


def is_done(rows: Path, wanted: dict[str, Any]) -> bool:
    """Whether an item has a row, of a process of its part before this one."""
    lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
    return any(wanted.items() <= json.loads(line).items() for line in lines)


def clean_up(lab: Lab) -> None:
    """Free what an item has left behind, for the figures of the next."""
    torch._dynamo.reset()  # and CUDA graphs
    gc.collect()
    if lab.cuda:
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def versions(lab: Lab, item: str) -> dict[str, Any]:
    """The device and its rates, and what is missing."""
    optional = {"nvidia.dali": dali.is_installed(), "deepspeed": is_here("deepspeed"), "pytest": is_here("pytest")}
    row: dict[str, Any] = {"missing": [name for name, there in optional.items() if not there]}
    if lab.cuda:
        properties = torch.cuda.get_device_properties(lab.device)
        row |= {
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    row |= {"matmul_tflops": round(matmul_tflops(lab.device), 3), "copy_gb_per_s": round(copy_gb_per_s(lab.device), 1)}
    name = ", ".join(about()["gpus"]) if lab.cuda else about()["cpu"]
    rates = f"{row['matmul_tflops']:.3g} TFLOP/s, {row['copy_gb_per_s']:.4g} GB/s"
    without = f", without {', '.join(row['missing'])}" if row["missing"] else ""
    return {**row, "summary": f"{name}, torch {about()['torch']}, {rates}{without}"}


def kernel_tests(lab: Lab, item: str) -> dict[str, Any]:
    return tests(lab, [f"tests/kernels/{item}.py"])


def other_tests(lab: Lab, item: str) -> dict[str, Any]:
    return tests(lab, [f"tests/{item}.py"])


def tests(lab: Lab, paths: Sequence[str]) -> dict[str, Any]:
    """pytest's verdict on the tests that are marked `gpu`, or on those that it came to before the limit."""
    if not is_here("pytest"):
        raise Skipped("pytest is not installed: pip install pytest")
    command = [sys.executable, "-m", "pytest", "-m", "gpu and not nightly", "-v", "-rN", "-p", "no:cacheprovider"]
    if is_here("xdist") and lab.cuda:
        command += ["-n", str(min(8, len(os.sched_getaffinity(0))))]
    output, ended = lab.folder / "pytest.txt", ""
    with open(output, "w") as file, subprocess.Popen([*command, *paths], cwd=ROOT, stdout=file) as process:
        try:
            process.wait(lab.seconds_left)
        except subprocess.TimeoutExpired:
            process.kill()
            ended = "; stopped at the limit"
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    print(*lines, sep="\n")
    words = [match[1] for line in lines if (match := re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line))]
    failed = [match[1] for line in lines if "FAILED" in line and (match := re.search(r"(tests/\S+::\S+)", line))]
    counts = {word.lower(): words.count(word) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    row = {**counts, "failures": sorted(set(failed))[:20]}
    summary = ", ".join(f"{count} {word}" for word, count in counts.items() if count) + ended
    if counts["failed"] or counts["error"] or process.returncode not in (0, SOME_TESTS_FAILED, NO_TESTS, -9):
        last = next((line for line in reversed(lines) if line.strip()), "")
        return {**row, "status": "failed", "error": f"{summary}; {(failed or [last])[0]}"}
    return {**row, "summary": summary or "no tests"}


def step(lab: Lab, item: str) -> dict[str, Any]:
    """A step of MoCo v2: `256 eager`."""
    batch, mode = item.split()
    return one_step(lab, MOCO, int(batch), mode)


def methods(lab: Lab, item: str) -> dict[str, Any]:
    group = load(str(ROOT / f"configs/{item}.toml")).values["data"]["samples_per_gpu"]
    return one_step(lab, item, group * max(1, 256 // group), "eager")


def vit(lab: Lab, item: str) -> dict[str, Any]:
    return one_step(lab, VIT, 256, item)


def one_step(lab: Lab, recipe: str, batch: int, mode: str) -> dict[str, Any]:
    """Figures of a recipe's step at a batch, and its share of the matrix rate measured beside it."""
    path = ROOT / f"configs/{recipe}.toml"
    num_samples = None
    overrides = [f"global_batch={batch}", "engine.micro_batch=auto", f"engine.device={lab.device.type}"]
    if lab.tiny:
        num_samples = 64
        overrides = [*small(recipe), *overrides[2:]]
    config = load(str(path), [*overrides, *MODES[mode]])
    if mode != "eager" and (recipe, batch) not in WORK:
        eager = load(str(path), [*overrides, *MODES["eager"]])
        WORK[recipe, batch] = tera_operations(engine_step(eager, lab.device, num_samples))
        clean_up(lab)
    step = engine_step(config, lab.device, num_samples)
    figures = measure(step, lab.device, *((2, 0.0) if lab.tiny else (5, 1.0)))
    if mode == "eager":
        WORK[recipe, batch] = tera_operations(step)
    work = WORK[recipe, batch]
    rate, share = matmul_tflops(lab.device), work / figures["ms"]["median"] * 1e3
    figures |= {"tflop": round(work, 4), "matmul_tflops": round(rate, 3), "of_matmul": round(share / rate, 4)}
    if mode == "graphs" and (note := cuda_graphs_note(step.recipe, step.plan)) is not None:
        figures["no_cuda_graphs"] = note
    group, plan = step.recipe.data.samples_per_gpu, step.plan
    expected = plan.machine.memory.total(plan.global_batch // group, plan.machine.micro_batch // group)
    figures["expected_gib"] = round(expected / 2**30, 3)
    if not math.isfinite(figures["loss"]):
        raise ArithmeticError(f"the loss is {figures['loss']}")
    peak = f", {figures['peak_gib']:.2f} GiB, {figures['host_waits']} waits" if lab.cuda else ""
    summary = f"{figures['ms']['median']:.1f} ms, {figures['images_per_s']:.0f} images/s{peak}"
    return {"recipe": config.name, "mode": mode, **figures, "summary": summary}


def views(lab: Lab, item: str) -> dict[str, Any]:
    """The exact stage's share of a recipe's views: time, and its bits against the torch forms on the CPU."""
    overrides, batch = [f"engine.device={lab.device.type}"], 8 if lab.tiny else 256
    if lab.tiny:
        overrides += small(item)
    groups = build(load(str(ROOT / f"configs/{item}.toml"), overrides)).data.views
    done = [next((k for k, step in enumerate(group.steps) if not step.geometric), 0) for group in groups]
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (batch, 3, 8, 8), generator=generator).float()

    def crops(group: ViewGroup) -> torch.Tensor:
        """Smooth images with noise."""
        smooth = torch.nn.functional.interpolate(coarse, group.size, mode="bicubic").repeat(group.num_views, 1, 1, 1)
        noise = torch.randint(-9, 10, smooth.shape, generator=generator)
        return (smooth + noise).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    given = [crops(group) for group in groups]
    arguments = view_arguments(groups, 0, 0, np.arange(batch), np.full((batch, 2), 256, dtype=np.int32))
    there = [[images.to(lab.device)] for images in given]
    stage = ExactStage(groups, lab.device, dali_steps=done, num_threads=1)
    made = stage(there, arguments)
    expected = ExactStage(groups, torch.device("cpu"), dali_steps=done, num_threads=os.cpu_count() or 1, compiled=False)
    wanted = expected([[images] for images in given], arguments)
    wrong = sum(int((own.cpu() != other).sum()) for own, other in zip(made, wanted, strict=True))
    count = max(1, 0 if lab.tiny else 20)
    ms = quantiles([1e3 * timed(lambda: stage(there, arguments), count, lab.device) / count for _ in range(3)])
    host = min(host_s(lambda: stage(there, arguments), lab.device) for _ in range(3))
    row = {"views": sum(map(len, made)), "ms": ms, "host_ms": round(1e3 * host, 2), "wrong_values": wrong}
    if wrong:
        total = sum(own.numel() for own in made)
        raise ArithmeticError(f"{wrong} of {total} values have not the bits of the CPU; {ms['median']:.2f} ms")
    bits = "the CPU's bits"
    return {**row, "summary": f"{row['views']} views, {ms['median']:.2f} ms, {row['host_ms']} ms of the host, {bits}"}


def small(recipe: str) -> list[str]:
    """Settings that make a recipe as small as its test does."""
    from test_shipped_recipes import smaller

    config = load(str(ROOT / f"configs/{recipe}.toml"))
    return [*smaller(config, Path("images"), Path("list.txt")), "max_iters=1000"]


def kernels(lab: Lab, item: str) -> dict[str, Any]:
    """A shape of an operation against eager PyTorch: `info_nce 0`."""
    benchmark = kernels_benchmark()
    name, _, number = item.rpartition(" ")
    dtype, sizes = benchmark.OPERATIONS[name].shapes[lab.device.type][int(number)]
    if lab.tiny:
        sizes = benchmark.OPERATIONS[name].odd
        benchmark.ROUND_S["cpu"] = 0.0
    if lab.cuda:
        torch.set_float32_matmul_precision("high")  # TF32 for all, as in training
    if number == "0":
        benchmark.check(name, lab.device)
    row = benchmark.measure(name, sizes, dtype, lab.device, 2 if lab.tiny else 5, False)
    del row["benchmark"]
    over, of = row["over_kernel"].get("eager"), row["of_ceiling"]["median"]
    against = f"eager takes {over['median']:.2f} times as long, " if over else "eager fails, "
    return {**row, "summary": f"{row['ms']['kernel']['median']:.3g} ms, {against}{100 * of:.0f} % of the ceiling"}


def kernel_items(lab: Lab) -> list[str]:
    """One shape of every operation first, then the others."""
    operations = kernels_benchmark().OPERATIONS
    numbered = [(k, name) for name, each in operations.items() for k in range(len(each.shapes[lab.device.type]))]
    return [f"{name} {k}" for k, name in sorted(numbered, key=lambda pair: pair[0])][
        : len(operations) if lab.tiny else None
    ]


@functools.cache
def kernels_benchmark() -> Any:
    """benchmarks/kernels.py, whose name is that of a package too."""
    specification = importlib.util.spec_from_file_location("kernels_benchmark", ROOT / "benchmarks/kernels.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # its dataclass looks there
    specification.loader.exec_module(module)
    return module


def training(lab: Lab, item: str) -> dict[str, Any]:
    """A run from its command line: speed, share of the time that it waited for data, loss."""
    from sslrun.cli import main as sslrun

    if item != "decoded" and not dali.is_installed():
        raise Skipped(f"DALI is not installed: {dali.install_command()}")
    folder = lab.folder / item
    folder.mkdir()
    recipe = TRAININGS[item](lab, folder)
    with contextlib.chdir(folder):  # where drawn images and run folders go
        code = sslrun([str(recipe), "--work-dir", "runs", f"--set=engine.device={lab.device.type}"])
    rows = [json.loads(line) for line in (folder / "runs" / recipe.stem / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "train/loss" in row]
    if code != 0 or not trained:
        raise RuntimeError(f"exit code {code}, {len(trained)} rows of metrics")
    last = {
        key: trained[-1].get(key)
        for key in ("step", "train/loss", "speed/images_per_s", "data/wait_pct", "mem/peak_gib")
    }
    speed, wait = last["speed/images_per_s"], last["data/wait_pct"]
    return {"recipe": recipe.stem, **last, "summary": f"{speed:.0f} images/s, waits {wait:.1f} % of the time for data"}


def decoded_recipe(lab: Lab, folder: Path) -> Path:
    """MoCo v2 on random images that need no decoding, in CIFAR-10's format: it runs without DALI."""
    random = torch.Generator().manual_seed(0)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"):
        content = torch.randint(0, 256, (64 if lab.tiny else 512, 3073), dtype=torch.uint8, generator=random)
        content[:, 0] %= 10
        (folder / f"{name}.bin").write_bytes(content.numpy().tobytes())
    return write_recipe(
        folder / "decoded.toml",
        "configs/quickstart.toml",
        "max_iters = 4\nlog.interval = 2" if lab.tiny else "max_iters = 60\nlog.interval = 20",
        'source = { _delete_ = true, type = "CIFAR10", data_prefix = "." }',
    )


def jpegs_recipe(lab: Lab, folder: Path) -> Path:
    """The quickstart: small drawn JPEGs."""
    return write_recipe(
        folder / "jpegs.toml",
        "configs/quickstart.toml",
        "max_iters = 4\nlog.interval = 2" if lab.tiny else "max_iters = 120\nlog.interval = 40",
        f'source = {{ type = "Shapes", split = "train", num_images = {128 if lab.tiny else 4000} }}',
    )


def mocov2_recipe(lab: Lab, folder: Path) -> Path:
    """MoCo v2 with ResNet-50 at batch 256 on JPEGs of 500 x 375 pixels, which the page cache holds."""
    if not (is_here("skimage") and is_here("sklearn")):
        raise Skipped("scikit-image and scikit-learn have the photographs, and are not installed")
    from photographs import jpeg, photographs

    images = folder / "images" / "class"
    images.mkdir(parents=True)
    random = np.random.default_rng(0)
    large = [pixels for pixels in photographs() if pixels.shape[0] >= 375 and pixels.shape[1] >= 500]
    for number in range(32 if lab.tiny else 512):
        pixels = large[number % len(large)]
        top, left = random.integers(0, pixels.shape[0] - 374), random.integers(0, pixels.shape[1] - 499)
        (images / f"{number:03d}.jpg").write_bytes(jpeg(pixels[top : top + 375, left : left + 500]))
    network = "[model]\nbackbone = { depth = 18, base_width = 4 }\nneck = { in_channels = 32 }\nqueue_len = 64\n"
    crops = "[data.views.0.transforms.0]\nsize = 64"
    length = "max_iters = 2\nlog.interval = 1\nglobal_batch = 32" if lab.tiny else "max_iters = 40\nlog.interval = 20"
    cores = len(os.sched_getaffinity(0))
    return write_recipe(
        folder / "mocov2.toml",
        "configs/mocov2.toml",
        length,
        f'workers_per_gpu = {cores}\nsource = {{ _delete_ = true, type = "ImageFolder", data_prefix = "images" }}',
        network + crops if lab.tiny else "",
    )


def write_recipe(path: Path, base: str, top: str, data: str, rest: str = "") -> Path:
    """A recipe without monitors and held-out images, that extends one of ours."""
    drops = '_delete_ = ["holdout"]' if "quickstart" in base else ""
    monitors = "[monitor]\nknn_interval = 0\nprobe_interval = 0\nrankme_interval = 0\n"
    length = '_delete_ = ["epochs"]'
    head = f'extends = "{ROOT / base}"\n{length}\n{top}\nengine.threads = 0'
    path.write_text(f"{head}\n[data]\n{drops}\n{data}\n{monitors}{rest}\n")
    return path


TRAININGS = {"decoded": decoded_recipe, "jpegs": jpegs_recipe, "mocov2": mocov2_recipe}


# ---------------------------------------------------------------------------------------------------------------------
# Rates and questions


@functools.cache
def matmul_tflops(device: torch.device) -> float:
    """10^12 operations per second of a large matrix product: bf16 on a GPU, float32 on a CPU."""
    size, dtype, count = (8192, torch.bfloat16, 20) if device.type == "cuda" else (512, torch.float32, 3)
    a, b, product = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    call = functools.partial(torch.mm, a, b, out=product)
    timed(call, 3, device)
    return 2 * size**3 * count / timed(call, count, device) / 1e12


def copy_gb_per_s(device: torch.device) -> float:
    """10^9 bytes read and written per second by a large copy."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**22, device=device)
    call = functools.partial(torch.empty_like(source).copy_, source)
    timed(call, 2, device)
    return 2 * source.nbytes * 5 / timed(call, 5, device) / 1e9


def is_here(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def step_items(lab: Lab) -> list[str]:
    return [f"{batch} {mode}" for batch in (256, 32) for mode in MODES]


def method_items(lab: Lab) -> list[str]:
    names = {path.stem for path in (ROOT / "configs").glob("*.toml")} - {"quickstart", MOCO}
    return sorted(names)


def gpu_test_files(lab: Lab) -> list[str]:
    """Files with tests marked `gpu`, those of the kernels apart."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    marked = [path.stem for path in files if re.search(r"mark\.gpu\b", path.read_text(encoding="utf-8"))]
    return marked[:1] if lab.tiny else marked


def kernel_test_files(lab: Lab) -> list[str]:
    """Files of kernel tests; that of the compiler's output needs no GPU."""
    files = (path.stem for path in (ROOT / "tests/kernels").glob("test_*.py"))
    names = sorted(name for name in files if name != "test_ahead_of_time")
    return names[-1:] if lab.tiny else names


PARTS: dict[str, tuple[Callable[[Lab], list[str]], Callable[[Lab, str], dict[str, Any]]]] = {
    "versions": (lambda lab: ["device"], versions),
    "kernel_tests": (kernel_test_files, kernel_tests),
    "step": (step_items, step),
    "kernels": (kernel_items, kernels),
    "views": (lambda lab: ["mocov2", "byol", "swav"], views),
    "methods": (method_items, methods),
    "vit": (lambda lab: list(MODES), vit),
    "training": (lambda lab: list(TRAININGS), training),
    "other_tests": (gpu_test_files, other_tests),
}


if __name__ == "__main__":
    sys.exit(main())
