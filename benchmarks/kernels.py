"""Compares each operation of sslkernels with eager PyTorch, torch.compile and a ceiling, alternating in one run.

    python benchmarks/kernels.py [--only info_nce] [--rounds 15] [--threads 2] [--compile]
    python benchmarks/kernels.py --table      write the tables of docs/kernels.md from the rows

It runs on a GPU, if there is one, with larger shapes, else on the CPU. Losses are timed forward and backward. Before it
is timed, each operation is compared with its reference in float64 at a small odd shape; a wrong operation is not timed.

Contestants take turns, so that noise affects all of them; rows have the quantiles of each and of the ratios of
neighboring measurements. `eager` is the operation's `reference`, `amp` the reference under autocast, `compile` the
compiled reference; the momentum update has further contestants. `views` is the exact stage on a batch of crops:
`kernel` with compiled code, Triton on a GPU and C on the CPU, `eager` with torch forms. The `ceiling` is the work per
second of one large copy (bytes read and written) or matrix product, which takes turns with the others.

On a GPU `ms` is device time: a spinning kernel gives the host a head start, so that launches do not count, and the
cache is emptied before each call. `alone_ms` is wall-clock time from an idle device to an idle device. On the CPU `ms`
is the wall-clock time of calls in a row. `peak_mib` is the memory that one call adds at its peak, results included:
allocated by torch on a GPU, resident on the CPU. `other_load` is the number of cores that were busy with other work
meanwhile; a row is reliable only if it is near 0.
"""

import argparse
import copy
import ctypes
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import numpy as np
import torch
import torch.nn.functional as F
from rows import RESULTS, append_row, quantiles
from torch import Tensor

from sslkernels.bank_nce import bank_nce
from sslkernels.bank_nce import reference as plain_bank_nce
from sslkernels.batch_nce import batch_nce
from sslkernels.batch_nce import reference as plain_batch_nce
from sslkernels.ema_update import ema_update_
from sslkernels.ema_update import reference as plain_ema_update_
from sslkernels.info_nce import info_nce
from sslkernels.info_nce import reference as plain_info_nce
from sslkernels.nt_xent import nt_xent
from sslkernels.nt_xent import reference as plain_nt_xent
from sslkernels.prototype_cross_entropy import prototype_cross_entropy
from sslkernels.prototype_cross_entropy import reference as plain_prototype_cross_entropy
from sslkernels.sinkhorn import reference as plain_sinkhorn
from sslkernels.sinkhorn import sinkhorn, sinkhorn_center
from sslkernels.soft_cross_entropy import reference as plain_soft_cross_entropy
from sslkernels.soft_cross_entropy import soft_cross_entropy
from sslrun.data.exact import ExactStage
from sslrun.data.graph import Arguments, view_arguments
from sslrun.data.transforms import (
    ColorJitter,
    GaussianBlur,
    Normalize,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Transform,
)
from sslrun.data.views import ViewGroup

DOCUMENT = ROOT / "docs" / "kernels.md"
RESOURCES = RESULTS / "kernel_resources.json"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # of |result - truth| / |truth|; float32 includes TF32
ROUND_S = {"cpu": 0.1, "cuda": 0.02}  # seconds per contestant and round; at least one call
CLOCK_HZ = 2e9  # approximate clock of a GPU

Sizes = dict[str, Any]
Call = Callable[[], Any]


# ---------------------------------------------------------------------------------------------------------------------
# Operations


@dataclass(frozen=True)
class Operation:
    """An operation, its inputs and its shapes.

    Attributes:
        kernel: the operation of sslkernels.
        reference: its reference in plain PyTorch.
        inputs: (device, dtype, **sizes) -> arguments; a loss is differentiated with respect to the first.
        step: wraps `kernel` or `reference` into a function of these arguments that returns the tensors to compare.
        work: (bytes of an element, **sizes) -> operations, or bytes as the operation's docstring counts them.
        ceiling: "matrix" or "copy", the kind of work that the ceiling measures.
        odd: sizes for the comparison with float64.
        shapes: (dtype, sizes) for each type of device.
        others: further contestants.
    """

    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[..., tuple[Any, ...]]
    step: Callable[[Callable[..., Any]], Callable[..., tuple[Tensor, ...]]]
    work: Callable[..., float]
    ceiling: str
    odd: Sizes
    shapes: dict[str, list[tuple[torch.dtype, Sizes]]]
    others: dict[str, Callable[..., Any]] = field(default_factory=dict)


def loss_and_gradient(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    def step(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
        result = function(x, *others)
        loss = result[0] if isinstance(result, tuple) else result
        return loss.detach(), *torch.autograd.grad(loss, x)

    return step


def loss_and_both_gradients(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    def step(x: Tensor, y: Tensor, *others: Any) -> tuple[Tensor, ...]:
        loss = function(x, y, *others)
        return loss.detach(), *torch.autograd.grad(loss, [x, y])

    return step


def value(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *arguments: (function(*arguments),)


def updated(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    def step(teacher: list[Tensor], *others: Any) -> tuple[Tensor, ...]:
        function(teacher, *others)
        return tuple(teacher)

    return step


def raw_rows(count: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random rows that are not normalized and require a gradient."""
    return torch.randn(count, dim, device=device, dtype=dtype).requires_grad_()


def unit_rows(count: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(count, dim, device=device), dim=1).to(dtype)


def scores(count: int, prototypes: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random scores in the range of cosines."""
    return torch.empty(count, prototypes, device=device).uniform_(-1, 1).to(dtype)


def info_nce_inputs(device: torch.device, dtype: torch.dtype, B: int, D: int, K: int) -> tuple[Any, ...]:
    return raw_rows(B, D, device, dtype), unit_rows(B, D, device, dtype), unit_rows(K, D, device, dtype), 0.2


def nt_xent_inputs(device: torch.device, dtype: torch.dtype, M: int, D: int) -> tuple[Any, ...]:
    return raw_rows(M, D, device, dtype), 0.1


def batch_nce_inputs(device: torch.device, dtype: torch.dtype, B: int, D: int, K: int) -> tuple[Any, ...]:
    own = torch.randperm(K, device=device)[:B]
    return raw_rows(B, D, device, dtype), unit_rows(K, D, device, dtype), own, 0.2


def bank_nce_inputs(device: torch.device, dtype: torch.dtype, B: int, D: int, K: int, bank: int) -> tuple[Any, ...]:
    own, drawn = torch.randint(bank, (B,), device=device), torch.randint(bank, (B, K), device=device)
    return raw_rows(B, D, device, dtype), unit_rows(bank, D, device, dtype), own, drawn, 0.07


def sinkhorn_inputs(device: torch.device, dtype: torch.dtype, B: int, K: int) -> tuple[Any, ...]:
    return scores(B, K, device, dtype), 0.05, 3


def soft_cross_entropy_inputs(device: torch.device, dtype: torch.dtype, B: int, K: int) -> tuple[Any, ...]:
    student, teacher = scores(B, K, device, dtype).requires_grad_(), scores(B, K, device, dtype)
    return student, teacher, 0.1, 0.05, teacher.float().mean(dim=0)


def prototype_inputs(device: torch.device, dtype: torch.dtype, N: int, R: int, D: int, K: int) -> tuple[Any, ...]:
    """Rows of the student that meet two targets each."""
    rows, prototypes = (F.normalize(torch.randn(n, D, device=device, dtype=dtype), dim=1) for n in (N, K))
    teacher, row = scores(R, K, device, dtype), torch.arange(N, device=device)
    pairs = torch.stack([row % R, (row + R // 2) % R], dim=1)
    shares = torch.full((N, 2), 1 / (2 * N), device=device)
    return rows.requires_grad_(), prototypes.requires_grad_(), teacher, pairs, shares, 0.1, 0.04, teacher.mean(dim=0)


def swav_inputs(device: torch.device, dtype: torch.dtype, B: int, K: int) -> tuple[Any, ...]:
    return scores(B, K, device, dtype).requires_grad_(), scores(B, K, device, dtype)


def swav(student: Tensor, teacher: Tensor) -> Tensor:
    """Loss against Sinkhorn targets, which are a softmax with a center and never created."""
    return soft_cross_entropy(student, teacher, 0.1, 0.05, sinkhorn_center(teacher, 0.05, 3))


def plain_swav(student: Tensor, teacher: Tensor) -> Tensor:
    return plain_soft_cross_entropy(student, plain_sinkhorn(teacher, 0.05, 3), 0.1, None)


def ema_inputs(device: torch.device, dtype: torch.dtype, of: str) -> tuple[Any, ...]:
    teacher, student = ([torch.randn(shape, device=device, dtype=dtype) for shape in PARAMETERS[of]] for _ in range(2))
    return teacher, student, 0.99


def tensor_by_tensor(teacher: list[Tensor], student: list[Tensor], momentum: float) -> None:
    """The loop that published code uses."""
    for t, s in zip(teacher, student, strict=True):
        t.data = t.data * momentum + s.data * (1 - momentum)


def foreach_lerp(teacher: list[Tensor], student: list[Tensor], momentum: float) -> None:
    torch._foreach_lerp_(teacher, student, 1 - momentum)


def foreach_mul_add(teacher: list[Tensor], student: list[Tensor], momentum: float) -> None:
    torch._foreach_mul_(teacher, momentum)
    torch._foreach_add_(teacher, student, alpha=1 - momentum)


def resnet50_mlp() -> list[tuple[int, ...]]:
    """Parameter shapes of ResNet-50 with MoCo v2's projector."""

    def convolution(out: int, into: int, size: int) -> list[tuple[int, ...]]:
        return [(out, into, size, size), (out,), (out,)]  # and its BatchNorm

    shapes, into = convolution(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(width, into, 1) + convolution(width, width, 3) + convolution(4 * width, width, 1)
            shapes += convolution(4 * width, into, 1) if block == 0 else []
            into = 4 * width
    return [*shapes, (2048, 2048), (2048,), (128, 2048), (128,)]


def vit_b16() -> list[tuple[int, ...]]:
    def linear(out: int, into: int) -> list[tuple[int, ...]]:
        return [(out, into), (out,)]

    norm = [(768,), (768,)]
    block = norm + linear(2304, 768) + linear(768, 768) + norm + linear(3072, 768) + linear(768, 3072)
    return [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,), *12 * block, *norm]


def views_inputs(device: torch.device, dtype: torch.dtype, B: int, side: int) -> tuple[Any, ...]:
    crops = [torch.randint(0, 256, (B, side, side, 3), dtype=torch.uint8, device=device) for _ in range(2)]
    (group,) = mocov2_views(side)
    arguments = view_arguments([group], 0, 0, np.arange(B), np.full((B, 2), 400))
    return crops, arguments, dtype


def mocov2_views(side: int) -> list[ViewGroup]:
    steps: list[Transform] = [
        *(RandomResizedCrop(side, (0.2, 1.0)), ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), RandomGrayscale(0.2)),
        *(GaussianBlur(0.1, 2.0, p=0.5), RandomHorizontalFlip()),
    ]
    return [ViewGroup(2, [*steps, Normalize()])]


@functools.cache
def stage(side: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> ExactStage:
    options: dict[str, Any] = {"num_threads": torch.get_num_threads(), "compiled": compiled, "dtype": dtype}
    return ExactStage(mocov2_views(side), device, dali_steps=[1], **options)


def made_views(crops: list[Tensor], arguments: Arguments, dtype: torch.dtype) -> Tensor:
    return stage(crops[0].shape[1], crops[0].device, dtype, True)([crops], arguments)[0]


def plain_views(crops: list[Tensor], arguments: Arguments, dtype: torch.dtype) -> Tensor:
    return stage(crops[0].shape[1], crops[0].device, dtype, False)([crops], arguments)[0]


def view_bytes(size: int, B: int, side: int) -> float:
    """Of the kernels: 80 % of the views have a contrast, half of them a blur that reaches 8 pixels."""
    of_a_blur = 2 * (1 + 16 / side) + 4 + size
    return 2 * B * 3 * side**2 * (1 + 0.8 + 0.5 * size + 0.5 * of_a_blur)


PARAMETERS = {"ResNet-50 + MLP": resnet50_mlp(), "ViT-B/16": vit_b16(), "odd": [(1,), (7, 13), (4099,), (3, 1, 5)]}


def shapes(dtype: torch.dtype, *sizes: Sizes) -> list[tuple[torch.dtype, Sizes]]:
    return [(dtype, each) for each in sizes]


FLOAT, HALF = torch.float32, torch.bfloat16
PROTOTYPES = {
    "cuda": [(HALF, {"B": 4000, "K": 65536}), (FLOAT, {"B": 512, "K": 3000})],
    "cpu": shapes(FLOAT, {"B": 512, "K": 4096}, {"B": 64, "K": 65536}),
}
OPERATIONS = {
    "info_nce": Operation(
        info_nce, plain_info_nce, info_nce_inputs, loss_and_gradient,
        work=lambda size, B, D, K: 4 * B * D * K, ceiling="matrix", odd={"B": 37, "D": 128, "K": 1003},
        shapes={
            "cuda": [
                (HALF, {"B": B, "D": D, "K": K}) for D in (128, 256) for K in (4096, 65536) for B in (256, 1024, 4096)
            ],
            "cpu": shapes(FLOAT, {"B": 256, "D": 128, "K": 4096}, {"B": 256, "D": 128, "K": 65536}),
        },
    ),
    "nt_xent": Operation(
        nt_xent, plain_nt_xent, nt_xent_inputs, loss_and_gradient,
        work=lambda size, M, D: 6 * M * M * D, ceiling="matrix", odd={"M": 194, "D": 128},
        shapes={
            "cuda": shapes(HALF, *({"M": M, "D": 128} for M in (512, 2048, 8192))),
            "cpu": shapes(FLOAT, *({"M": M, "D": 128} for M in (512, 2048))),
        },
    ),
    "batch_nce": Operation(
        batch_nce, plain_batch_nce, batch_nce_inputs, loss_and_gradient,
        work=lambda size, B, D, K: 4 * B * D * K, ceiling="matrix", odd={"B": 37, "D": 256, "K": 203},
        shapes={
            "cuda": shapes(HALF, {"B": 4096, "D": 256, "K": 4096}),
            "cpu": shapes(FLOAT, {"B": 512, "D": 256, "K": 4096}),
        },
    ),
    "bank_nce": Operation(
        bank_nce, plain_bank_nce, bank_nce_inputs, loss_and_gradient,
        work=lambda size, B, D, K, bank: B * K * (size * D + 8), ceiling="copy",
        odd={"B": 7, "D": 128, "K": 203, "bank": 1003},
        shapes={
            "cuda": shapes(FLOAT, *({"B": 256, "D": 128, "K": K, "bank": 1_281_167} for K in (4096, 65536))),
            "cpu": shapes(FLOAT, {"B": 64, "D": 128, "K": 4096, "bank": 50_000}),
        },
    ),
    "sinkhorn": Operation(
        sinkhorn, plain_sinkhorn, sinkhorn_inputs, value,
        work=lambda size, B, K: 8 * size * B * K, ceiling="copy", odd={"B": 37, "K": 1003}, shapes=PROTOTYPES,
    ),
    "soft_cross_entropy": Operation(
        soft_cross_entropy, plain_soft_cross_entropy, soft_cross_entropy_inputs, loss_and_gradient,
        work=lambda size, B, K: 5 * size * B * K, ceiling="copy", odd={"B": 37, "K": 1003}, shapes=PROTOTYPES,
    ),
    "prototype_cross_entropy": Operation(
        prototype_cross_entropy, plain_prototype_cross_entropy, prototype_inputs, loss_and_both_gradients,
        work=lambda size, N, R, D, K: (6 * N + 4 * R) * K * D, ceiling="matrix",
        odd={"N": 37, "R": 6, "D": 24, "K": 1003},
        shapes={
            "cuda": shapes(FLOAT, {"N": 640, "R": 128, "D": 256, "K": 65536}),
            "cpu": shapes(FLOAT, *({"N": 10 * B, "R": 2 * B, "D": 256, "K": 16384} for B in (16, 64))),
        },
    ),
    "sinkhorn + soft_cross_entropy": Operation(
        swav, plain_swav, swav_inputs, loss_and_gradient,
        work=lambda size, B, K: 10 * size * B * K, ceiling="copy", odd={"B": 37, "K": 1003}, shapes=PROTOTYPES,
    ),
    "ema_update_": Operation(
        ema_update_, plain_ema_update_, ema_inputs, updated,
        work=lambda size, of: 3 * size * sum(math.prod(shape) for shape in PARAMETERS[of]), ceiling="copy",
        odd={"of": "odd"},
        shapes={
            "cuda": shapes(FLOAT, {"of": "ResNet-50 + MLP"}, {"of": "ViT-B/16"}),
            "cpu": shapes(FLOAT, {"of": "ResNet-50 + MLP"}),
        },
        others={"loop": tensor_by_tensor, "foreach lerp": foreach_lerp, "foreach mul, add": foreach_mul_add},
    ),
    "views": Operation(
        made_views, plain_views, views_inputs, value,
        work=view_bytes, ceiling="copy", odd={"B": 3, "side": 35},
        shapes={
            "cuda": [(dtype, {"B": B, "side": 224}) for dtype in (HALF, FLOAT) for B in (256, 32)],
            "cpu": shapes(FLOAT, {"B": 32, "side": 224}),
        },
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=OPERATIONS, metavar="OP", help=", ".join(OPERATIONS))
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each contestant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch on the CPU")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="include torch.compile as a contestant; the default on a GPU",
    )
    parser.add_argument("--table", action="store_true", help="only write the tables of docs/kernels.md")
    args = parser.parse_args()
    if args.table:
        write_tables()
        return
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for all, as in training
    names = args.only or list(OPERATIONS)
    for name in names:
        check(name, device)
    print(f"{', '.join(names)}: agree with float64", flush=True)
    measured = []
    for name in names:
        for dtype, sizes in OPERATIONS[name].shapes[device.type]:
            row = measure(name, sizes, dtype, device, args.rounds, args.compile)
            append_row("kernels", row)
            measured.append(row)
            figures = f"{medians(row['ms'])} ms; {row['peak_mib']} MiB; other load {row['other_load']}"
            print(f"{name} {row['shape']}: {figures}", flush=True)
    print(*table(measured), sep="\n")


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def check(name: str, device: torch.device) -> None:
    """Compare an operation with float64 at its odd sizes, in every dtype that is timed on this device.

    Raises:
        AssertionError: the relative error is above `TOLERANCE`.
    """
    operation = OPERATIONS[name]
    for dtype in {dtype for dtype, _ in operation.shapes[device.type]}:
        torch.manual_seed(0)
        inputs = operation.inputs(device, dtype, **operation.odd)
        truth = operation.step(operation.reference)(*in_float64(inputs))
        results = operation.step(operation.kernel)(*inputs)
        for place, (result, true) in enumerate(zip(results, truth, strict=True)):
            error = float((result.double() - true).norm() / true.norm())
            assert error < TOLERANCE[dtype], f"{name} in {dtype}, result {place}: off by {error:.2g} of the truth"


def in_float64(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)(map(in_float64, x))
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def measure(
    name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, rounds: int, with_compile: bool
) -> dict[str, Any]:
    """Measure one shape; its row."""
    operation = OPERATIONS[name]
    torch.manual_seed(0)
    inputs = operation.inputs(device, dtype, **sizes)
    calls, failed = {}, {}
    for contestant, function in contestants(operation, dtype, with_compile).items():
        call = functools.partial(operation.step(function), *copy.deepcopy(inputs))
        try:
            call()
            calls[contestant] = call
        except RuntimeError as error:  # out of memory, or a failure of the compiler
            if contestant == "kernel":
                raise
            failed[contestant] = str(error).partition("\n")[0]
    del inputs, call
    peak_mib = {contestant: round(peak_bytes(call, device) / 2**20, 3) for contestant, call in calls.items()}
    on_gpu = device.type == "cuda"
    launched = {contestant: launches(call) for contestant, call in calls.items()} if on_gpu else None
    ceiling_work, calls["ceiling"] = ceiling(operation.ceiling, device)
    timings = [(call, *counts(call, device)) for call in calls.values()]
    seconds: dict[str, list[float]] = {contestant: [] for contestant in calls}
    alone: dict[str, list[float]] = {contestant: [] for contestant in calls if on_gpu}
    begin = processor_s(), time.process_time(), time.perf_counter()
    for number in range(rounds):
        turns = list(zip(calls, timings, strict=True))
        for contestant, (call, count, head_start_s) in turns[number % len(turns) :] + turns[: number % len(turns)]:
            seconds[contestant].append(timed(call, count, device, head_start_s))
            if on_gpu:
                alone[contestant].append(timed_alone(call, count))
    everybody, own, wall = (
        now - then for now, then in zip((processor_s(), time.process_time(), time.perf_counter()), begin, strict=True)
    )
    work, kernel = operation.work(dtype.itemsize, **sizes), seconds["kernel"]
    ceilings = [ceiling_work / s for s in seconds["ceiling"]]
    row = {
        "benchmark": "kernels",
        "operation": name,
        "shape": ", ".join(f"{key} {size:,}" if isinstance(size, int) else str(size) for key, size in sizes.items()),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, threads: {torch.get_num_threads()}",
        "other_load": round((everybody - own) / wall, 2),
        "ms": {contestant: quantiles([1e3 * s for s in values]) for contestant, values in seconds.items()},
        "over_kernel": over_kernel(seconds),
        "peak_mib": peak_mib,
        "work": {operation.ceiling: work},
        "ceiling_per_s": quantiles(ceilings),
        "of_ceiling": quantiles([work / s / top for s, top in zip(kernel, ceilings, strict=True)]),
    }
    if on_gpu:
        row["alone_ms"] = {contestant: quantiles([1e3 * s for s in values]) for contestant, values in alone.items()}
        row["alone_over_kernel"] = over_kernel(alone)
        row["launches"] = launched
    return {**row, **({"failed": failed} if failed else {})}


def contestants(operation: Operation, dtype: torch.dtype, with_compile: bool) -> dict[str, Callable[..., Any]]:
    sides = {"kernel": operation.kernel, "eager": operation.reference, **operation.others}
    if dtype == HALF:
        sides["amp"] = torch.autocast("cuda", HALF)(operation.reference)
    if with_compile:
        torch.compiler.reset()
        sides["compile"] = torch.compile(operation.reference, fullgraph=True, dynamic=False)
    return sides


def over_kernel(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Quantiles over rounds of each contestant's time divided by the kernel's."""
    return {
        contestant: quantiles([other / own for other, own in zip(values, seconds["kernel"], strict=True)])
        for contestant, values in seconds.items()
        if contestant not in ("kernel", "ceiling")
    }


@functools.cache
def ceiling(kind: str, device: torch.device) -> tuple[float, Call]:
    """(work of one call, the call): operations, or bytes read and written."""
    if kind == "copy":
        source = torch.full((2**28 if device.type == "cuda" else 2**26,), 0.1, device=device)
        return 2 * source.nbytes, functools.partial(torch.clone(source).copy_, source)
    size, dtype = (8192, HALF) if device.type == "cuda" else (2048, FLOAT)
    a, b, product = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    return 2 * size**3, functools.partial(torch.mm, a, b, out=product)


def counts(call: Call, device: torch.device) -> tuple[int, float]:
    """(calls per round, seconds that the host needs for one call), after warming up."""
    call()
    host_s = total_s = 0.0
    for _ in range(2):
        synchronize(device)
        begin = time.perf_counter()
        call()
        host_s = time.perf_counter() - begin
        synchronize(device)
        total_s = time.perf_counter() - begin
    return max(1, min(100, round(ROUND_S[device.type] / total_s))), host_s


def timed(call: Call, count: int, device: torch.device, host_s: float) -> float:
    """Seconds of a call."""
    if device.type == "cpu":
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - begin) / count
    events = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other_data(device).zero_()
        torch.cuda._sleep(int(min(2 * host_s, 0.02) * CLOCK_HZ))
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def timed_alone(call: Call, count: int) -> float:
    """Seconds of a call from an idle GPU to an idle GPU."""
    seconds = []
    for _ in range(count):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


@functools.cache
def other_data(device: torch.device) -> Tensor:
    """256 MiB; writing them evicts everything else from the cache."""
    return torch.empty(2**28, dtype=torch.uint8, device=device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def processor_s() -> float:
    """Seconds that this machine's cores have worked for all processes, or were taken by other virtual machines."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def peak_bytes(call: Call, device: torch.device) -> int:
    """Peak memory in bytes that a call adds; the call must have been made once before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free but not returned would hide the call's
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_bytes("VmRSS")
    call()
    return resident_bytes("VmHWM") - before


def resident_bytes(key: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def launches(call: Call) -> int:
    """Number of kernels, copies and fills that a call launches on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.is_user_annotation for event in events)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def table(measured: list[dict[str, Any]]) -> list[str]:
    """Markdown table with a line for each row."""
    lines = [
        "| operation | shape | device | ms | eager | compile | others | alone: eager, compile | memory | of ceiling "
        "| other load |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in measured:
        ratios, alone = row["over_kernel"], row.get("alone_over_kernel", {})
        others = [f"{name} {spread(ratio)}" for name, ratio in ratios.items() if name not in ("eager", "compile")]
        own, eager = row["peak_mib"]["kernel"], row["peak_mib"].get("eager")
        memory = f"{own:.1f} MiB" + (f", {100 * own / eager:.1f} %" if eager else "")
        kind = next(iter(row["work"]))
        cells = [
            f"`{row['operation']}`",
            f"{row['shape']}, {row['dtype']}",
            row["device"],
            f"{row['ms']['kernel']['median']:.3g}",
            *(spread(ratios[name]) if name in ratios else "-" for name in ("eager", "compile")),
            ", ".join(others) or "-",
            ", ".join(f"{alone[name]['median']:.2f}" for name in ("eager", "compile") if name in alone) or "-",
            memory,
            f"{100 * row['of_ceiling']['median']:.0f} % {kind}",
            f"{row['other_load']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['p25']:.2f}-{ratio['p75']:.2f})"


def medians(figures: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {each['median']:.3g}" for name, each in figures.items())


def resources_table() -> list[str]:
    lines = [
        "| launch | architecture | kernel | registers | spilled bytes | shared bytes | warps |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in json.loads(RESOURCES.read_text(encoding="utf-8"))["kernels"]:
        figures = " | ".join(f"{line[key]:,}" for key in ("registers", "spilled_bytes", "shared_bytes", "warps"))
        lines.append(f"| {line['launch']} | sm_{line['arch']} | `{line['kernel']}` | {figures} |")
    return lines


def write_tables() -> None:
    """Rewrite the tables of docs/kernels.md from the last row of each operation, shape and device."""
    last = {}
    for line in (RESULTS / "kernels.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        last[row["device"], row["operation"], row["dtype"], row["shape"]] = row
    place = {name: number for number, name in enumerate(OPERATIONS)}
    measured = sorted(last.values(), key=lambda row: (place[row["operation"]], row["device"]))
    replace_table("measured", table(measured))
    if RESOURCES.exists():
        replace_table("resources", resources_table())


def replace_table(name: str, lines: list[str]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    start, end = f"<!-- table: {name}, by benchmarks/kernels.py --table -->", f"<!-- end of table: {name} -->"
    before, after = text[: text.index(start) + len(start)], text[text.index(end) :]
    DOCUMENT.write_text("\n".join([before, *lines, after]), encoding="utf-8")


if __name__ == "__main__":
    main()
