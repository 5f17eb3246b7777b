"""Measures whether updating the momentum teacher in the same pass over memory as the optimizer pays off.

    python benchmarks/fused_update.py [--rounds 21] [--optimizers sgd lars adamw] [--networks resnet50_mlp vit_b]
                                      [--processor-time]

These versions alternate in one run, on a GPU if there is one:

    separate    the optimizer of a recipe (torch's fused SGD and AdamW, sslrun's LARS), then `ema_update_`
    apart       the optimizer's formula compiled over one flat buffer, then `ema_update_` over flat buffers
    one_pass    both formulas compiled as one function over flat buffers: each tensor is read and written once
    chain       LARS as a chain of foreach operations, as sslrun had it, then `ema_update_`

The step from `apart` to `one_pass` is the gain of fusing; the step from `separate` to `apart` is the gain of flat
buffers and one loop in the optimizer alone. Bytes count each float32 that is read or written per parameter. Before
anything is timed, the results of all are compared. On a GPU times are device times, with launches queued ahead.
On a busy CPU `--processor-time` counts the time that one thread computes, without that in which others have its core.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from rows import append_row, quantiles
from torch import Tensor, nn

from sslkernels.ema_update import ema_update_
from sslrun.nn.necks import MoCoV2Neck
from sslrun.nn.resnet import ResNet
from sslrun.optim.lars import LARS, trust_ratios

LR, MOMENTUM, DECAY, BETAS, EPS, ETA = 1e-3, 0.9, 1e-4, (0.9, 0.999), 1e-8, 1e-3
TEACHER_MOMENTUM = 0.99
BLOCK = 256  # elements that share a trust ratio; tensors begin at multiples of BLOCK in a flat buffer

# Reads and writes of float32, for each parameter: w weight, g gradient, m v the optimizer's state, t teacher.
BYTES = {
    "sgd": {"separate": 4 * (5 + 3), "apart": 4 * (5 + 3), "one_pass": 4 * 7},  # wgm wm + wt t; wgmt wmt
    "adamw": {"separate": 4 * (7 + 3), "apart": 4 * (7 + 3), "one_pass": 4 * 9},  # wgmv wmv + wt t; wgmvt wmvt
    # wg (norms), wgm wm; chain: wg u (update), wg (norms), u u (scale), wum wm
    "lars": {"separate": 4 * (7 + 3), "apart": 4 * (7 + 3), "one_pass": 4 * 9, "chain": 4 * (12 + 3)},
}
RATIOS = [
    ("one_pass", "apart"), ("one_pass", "separate"), ("separate", "apart"), ("chain", "apart"), ("chain", "separate"),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--optimizers", nargs="+", choices=list(BYTES), default=list(BYTES))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--processor-time", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for network in args.networks:
        for optimizer in args.optimizers:
            measure(optimizer, network, device, args.rounds, time.thread_time if args.processor_time else None)


def measure(
    optimizer: str, network: str, device: torch.device, rounds: int, clock: Callable[[], float] | None = None
) -> None:
    assert clock is None or (device.type == "cpu" and torch.get_num_threads() == 1), (
        "processor time is that of a thread"
    )
    torch.manual_seed(0)
    shapes = NETWORKS[network]()
    weights = [0.05 * torch.randn(shape, device=device) for shape in shapes]
    gradients = [0.01 * torch.randn(shape, device=device) for shape in shapes]
    sides: dict[str, Any] = {
        "separate": Separate(optimizer, weights, gradients),
        "apart": Flat(optimizer, weights, gradients, is_one_pass=False),
        "one_pass": Flat(optimizer, weights, gradients, is_one_pass=True),
    }
    if optimizer == "lars":
        sides["chain"] = Chain(weights, gradients)
    for _ in range(3):
        for side in sides.values():
            side()
    check_equal(sides)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sorted(sides, reverse=number % 2 == 0):  # versions alternate in the first place
            times[name].append(timed(sides[name], 4, device, clock or time.perf_counter))
    count = sum(w.numel() for w in weights)
    row = {
        "benchmark": "fused_update",
        "optimizer": optimizer,
        "network": network,
        "parameters": count,
        "tensors": len(shapes),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "clock": "processor" if clock else "wall",
        "load_average": round(os.getloadavg()[0], 1),
        "bytes_per_parameter": BYTES[optimizer],
        "ms": {name: quantiles([1e3 * t for t in values]) for name, values in times.items()},
        "gb_per_s": {
            name: round(BYTES[optimizer][name] * count / statistics.median(values) / 1e9, 1)
            for name, values in times.items()
        },
        **{f"{one}_over_{other}": ratios(times[one], times[other]) for one, other in RATIOS if one in times},
    }
    append_row("fused_update", row)
    print(f"{network} {optimizer}: bytes {BYTES[optimizer]}, GB/s {row['gb_per_s']}")
    print("   ms", {name: figures["median"] for name, figures in row["ms"].items()}, end="; ")
    for name in (name for name in row if "_over_" in name):
        print("  ", name, row[name]["median"])


class Separate:
    """Optimizer and teacher over lists of tensors, as in an executor."""

    def __init__(self, optimizer: str, weights: list[Tensor], gradients: list[Tensor]) -> None:
        self.weights = [nn.Parameter(w.clone()) for w in weights]
        self.teacher = [w.clone() for w in weights]
        for parameter, gradient in zip(self.weights, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer = {
            "sgd": lambda: torch.optim.SGD(self.weights, LR, MOMENTUM, weight_decay=DECAY, fused=True),
            "adamw": lambda: torch.optim.AdamW(self.weights, LR, BETAS, EPS, weight_decay=DECAY, fused=True),
            "lars": lambda: LARS(self.weights, LR, MOMENTUM, DECAY, eta=ETA, eps=EPS),
        }[optimizer]()

    def __call__(self) -> None:
        self.optimizer.step()
        ema_update_(self.teacher, self.weights, TEACHER_MOMENTUM)


class Chain:
    """LARS as five operations over lists of tensors, with a temporary of the size of all gradients."""

    def __init__(self, weights: list[Tensor], gradients: list[Tensor]) -> None:
        self.weights, self.gradients = [w.clone() for w in weights], gradients
        self.teacher = [w.clone() for w in weights]
        self.buffers = [torch.zeros_like(w) for w in weights]

    @torch.no_grad()
    def __call__(self) -> None:
        updates = list(torch._foreach_add(self.gradients, self.weights, alpha=DECAY))
        norms = torch.stack(torch._foreach_norm(self.weights)), torch.stack(torch._foreach_norm(self.gradients))
        torch._foreach_mul_(updates, (LR * trust_ratios(*norms, DECAY, ETA, EPS)).unbind())
        torch._fused_sgd_(
            self.weights, updates, self.buffers, weight_decay=0.0, momentum=MOMENTUM, lr=1.0, dampening=0.0,
            nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip
        ema_update_(self.teacher, self.weights, TEACHER_MOMENTUM)


class Flat:
    """One flat buffer for each kind of tensor, and one compiled function."""

    def __init__(self, optimizer: str, weights: list[Tensor], gradients: list[Tensor], is_one_pass: bool) -> None:
        self.is_one_pass = is_one_pass
        self.w, self.g = flat(weights), flat(gradients)
        self.m, self.v, self.t = torch.zeros_like(self.w), torch.zeros_like(self.w), self.w.clone()
        blocks = torch.tensor([-(-w.numel() // BLOCK) for w in weights])
        self.segment = torch.repeat_interleave(torch.arange(len(weights)), blocks).to(self.w.device)
        self.norms = torch.zeros(len(weights), 2, device=self.w.device)
        self.steps = 0
        self.corrections = torch.ones(2, device=self.w.device).unbind()
        self.update = torch.compile(
            {"sgd": self.sgd, "adamw": self.adamw, "lars": self.lars}[optimizer], fullgraph=True
        )
        self.is_adam = optimizer == "adamw"

    @torch.no_grad()
    def __call__(self) -> None:
        if self.is_adam:
            self.steps += 1
            for correction, beta in zip(self.corrections, BETAS, strict=True):
                correction.fill_(1 - beta**self.steps)
        self.update()
        if not self.is_one_pass:
            ema_update_([self.t], [self.w], TEACHER_MOMENTUM)

    def sgd(self) -> None:
        m = MOMENTUM * self.m + self.g + DECAY * self.w
        self.m.copy_(m)
        self.move(self.w - LR * m)

    def adamw(self) -> None:
        first, second = self.corrections
        m = self.m + (1 - BETAS[0]) * (self.g - self.m)
        v = BETAS[1] * self.v + (1 - BETAS[1]) * self.g * self.g
        self.m.copy_(m)
        self.v.copy_(v)
        self.move((1 - LR * DECAY) * self.w - LR / first * m / ((v / second).sqrt() + EPS))

    def lars(self) -> None:
        squares = torch.stack([self.w.square().sum(1), self.g.square().sum(1)], dim=1)
        weight_norm, gradient_norm = self.norms.index_add(0, self.segment, squares).sqrt().unbind(1)
        ratio = ETA * weight_norm / (gradient_norm + DECAY * weight_norm + EPS)
        ratio = torch.where((weight_norm > 0) & (gradient_norm > 0), ratio, 1.0)
        m = MOMENTUM * self.m + (LR * ratio)[self.segment][:, None] * (self.g + DECAY * self.w)
        self.m.copy_(m)
        self.move(self.w - m)

    def move(self, w: Tensor) -> None:
        self.w.copy_(w)
        if self.is_one_pass:
            self.t.copy_(self.t + (1 - TEACHER_MOMENTUM) * (w - self.t))


def flat(tensors: list[Tensor]) -> Tensor:
    """(blocks, BLOCK): all tensors in a row, each padded with zeros to whole blocks."""
    return torch.cat([nn.functional.pad(x.reshape(-1), (0, -x.numel() % BLOCK)) for x in tensors]).view(-1, BLOCK)


def check_equal(sides: dict[str, Any]) -> None:
    separate = sides["separate"]
    with torch.no_grad():
        expected = flat(separate.weights), flat(separate.teacher)
    for name in ("apart", "one_pass"):
        for ours, theirs in zip((sides[name].w, sides[name].t), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    if "chain" in sides:
        for ours, theirs in zip(sides["chain"].weights, separate.weights, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)


def timed(call: Callable[[], None], count: int, device: torch.device, clock: Callable[[], float]) -> float:
    """Mean seconds per call of `count` calls in a row."""
    if device.type == "cpu":
        begin = clock()
        for _ in range(count):
            call()
        return (clock() - begin) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(50_000_000)  # some 30 ms of head start for the host
    begin.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def ratios(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Quantiles of the ratios of neighboring measurements."""
    return quantiles([a / b for a, b in zip(ours, theirs, strict=True)])


def resnet50_mlp() -> list[tuple[int, ...]]:
    """Parameter shapes of MoCo v2's ResNet-50 and projector: 28.0 M parameters."""
    model = nn.Sequential(ResNet(50), MoCoV2Neck(2048, 2048, 128))
    return [tuple(p.shape) for p in model.parameters()]


def vit_b() -> list[tuple[int, ...]]:
    """ViT-B/16 with its classifier (Dosovitskiy et al. 2020, arXiv 2010.11929): 86.6 M parameters."""

    def linear(inputs: int, outputs: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs), (outputs,)]

    norm = [(768,), (768,)]
    block = [*norm, *linear(768, 3 * 768), *linear(768, 768), *norm, *linear(768, 4 * 768), *linear(4 * 768, 768)]
    return [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,), *12 * block, *norm, *linear(768, 1000)]


NETWORKS = {"resnet50_mlp": resnet50_mlp, "vit_b": vit_b}


if __name__ == "__main__":
    main()
