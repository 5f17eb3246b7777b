"""Trains the quickstart with the fused loss and momentum update, and again with plain PyTorch in their place.

    python benchmarks/loss_curve.py [CONFIG] [--set KEY=VALUE]... [--nudges 2] [--kinds fused plain]

At each step of each run, loss and gradient are computed both ways on the same embeddings, and the momentum update is
compared with float64; the row has the largest differences of the run. The runs diverge nevertheless, because training
amplifies rounding. To show how far, `--nudges` repeats both kinds after moving a random half of the initial weights by
one unit in the last place. One row per run, with the loss at each logged step and the k-NN accuracy.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from rows import append_row
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sslkernels import ema_update_
from sslkernels.info_nce import info_nce, reference
from sslrun.config import Config, load
from sslrun.recipe import Recipe
from sslrun.runtime.executor import Executor
from sslrun.session import build
from sslrun.training import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs/quickstart.toml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--nudges", type=int, default=2, help="further runs of each kind, with changed initial weights")
    parser.add_argument("--kinds", nargs="+", choices=("fused", "plain"), default=["fused", "plain"])
    args = parser.parse_args()
    for nudge in range(args.nudges + 1):
        for kind in args.kinds:
            row = {"benchmark": "loss_curve", "config": Path(args.config).stem, "overrides": args.overrides}
            row |= {"kind": kind, "nudge": nudge, **measure(kind, nudge, args.config, args.overrides)}
            append_row("loss_curve", row)
            print(kind, nudge, f"last losses {row['last_losses_mean']:.4f}", row["knn_top1_pct"], row["differences"])


def measure(kind: str, nudge: int, path: str, overrides: list[str]) -> dict[str, Any]:
    """Metrics of one run, and the largest differences over its steps."""
    largest: dict[str, float] = {"loss": 0.0, "gradient": 0.0, "momentum": 0.0}

    def note(name: str, difference: float) -> None:
        largest[name] = max(largest[name], difference)

    def loss(queries: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast(queries.device.type, enabled=False):
            if not isinstance(queries, FakeTensor):  # with which the engine estimates memory
                leaf = queries.detach().float().requires_grad_()
                plain, fused = reference(leaf, *others)[0], info_nce(leaf, *others)[0]
                expected, gradient = (torch.autograd.grad(value, leaf)[0] for value in (plain, fused))
                note("loss", abs(float(fused / plain) - 1))
                note("gradient", float((gradient - expected).norm() / expected.norm()))
            return (reference if kind == "plain" else info_nce)(queries.float(), *others)

    def move(self: Executor, teachers: list[Tensor], students: list[Tensor], momentum: float) -> None:
        pairs = list(zip(teachers, students, strict=True))
        expected = [t.detach().double() * momentum + s.detach().double() * (1 - momentum) for t, s in pairs]
        if kind == "fused":
            ema_update_(teachers, students, momentum)
        else:
            for t, s in pairs:
                t.data = t.data * momentum + s.data * (1 - momentum)
        for (t, _), e in zip(pairs, expected, strict=True):
            note("momentum", float((t.detach() - e).abs().max() / e.abs().max().clamp_min(1e-30)))

    def built(config: Config) -> Recipe:
        recipe = build(config)
        if nudge:
            move_by_one_unit(recipe.model, nudge)
        return recipe

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for target, replacement in (("nn.heads.info_nce", loss), ("train.build", built)):
            stack.enter_context(mock.patch(f"sslrun.{target}", replacement))
        stack.enter_context(mock.patch.object(Executor, "_move", move))
        config = load(path, [*overrides, f"work_dir={folder}", "log.interval=10"])
        assert run(config, None, "benchmarks/loss_curve.py") == 0
        (metrics,) = Path(folder).rglob("metrics.jsonl")
        entries = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = {entry["step"]: entry["train/loss"] for entry in entries if "train/loss" in entry}
    last = list(losses.values())[-8:]
    return {
        "differences": largest,
        "last_losses_mean": sum(last) / len(last),
        "knn_top1_pct": [entry["knn/top1_pct"] for entry in entries if "knn/top1_pct" in entry],
        "loss": losses,
    }


def move_by_one_unit(method: torch.nn.Module, seed: int) -> None:
    """Move a random half of the weights to the next larger float."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in method.parameters():
            chosen = (torch.rand(weight.shape, generator=random) < 0.5).to(weight.device)
            weight.copy_(torch.where(chosen, weight.nextafter(torch.full_like(weight, torch.inf)), weight))


if __name__ == "__main__":
    main()
