"""The quickstart's MoCo v2 trained with the fused loss and momentum update, and with plain PyTorch in their place.

    python benchmarks/loss_curve.py [CONFIG] [--set KEY=VALUE]...

Three runs of one recipe and seed: fused; plain; and plain again with half of the weights moved by one unit in the last
place after initialisation, which says how far rounding alone drives two runs apart. The row has the relative difference
of the fused and of the nudged run's loss from the plain run's at each logged step, and the k-NN accuracy of all three.
In the plain runs each step's loss and gradient are also computed by the fused loss, on the very same embeddings: the
largest relative differences are in the row too.
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
from torch._subclasses.fake_tensor import FakeTensor

from sslkernels.info_nce import info_nce, reference
from sslrun.config import Config, load
from sslrun.recipe import Recipe
from sslrun.runtime.executor import Executor
from sslrun.session import build
from sslrun.train import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs/quickstart.toml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: curve(name, args.config, args.overrides, Path(folder, name)) for name in SIDES}
    plain = losses(curves["plain"])
    row: dict[str, Any] = {"benchmark": "loss_curve", "config": Path(args.config).stem, "overrides": args.overrides}
    for name in ("fused", "nudged"):
        own = losses(curves[name])
        row[f"{name}_relative_difference"] = {step: abs(own[step] / loss - 1) for step, loss in plain.items()}
    row["same_embeddings"] = {
        "steps": len(differences),
        "loss_max_relative_difference": max(loss for loss, _ in differences),
        "gradient_max_relative_difference": max(gradient for _, gradient in differences),
    }
    row["loss"] = {name: losses(curve) for name, curve in curves.items()}
    row["knn_top1_pct"] = {
        name: [entry["knn/top1_pct"] for entry in curve if "knn/top1_pct" in entry] for name, curve in curves.items()
    }
    append_row("loss_curve", row)
    for step in plain:
        print(step, *(f"{name} {losses(curve)[step]:.7f}" for name, curve in curves.items()))
    print(row["knn_top1_pct"], row["same_embeddings"])


def plain_loss(queries: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, outside autocast, as the fused loss computes it; notes how far from it that is."""
    with torch.autocast(queries.device.type, enabled=False):
        if not isinstance(queries, FakeTensor):  # as the engine passes to count memory
            leaf = queries.detach().float().requires_grad_()
            losses = reference(leaf, *others)[0], info_nce(leaf, *others)[0]
            plain, fused = (torch.autograd.grad(loss, leaf)[0] for loss in losses)
            differences.append((abs(float(losses[1] / losses[0]) - 1), float((fused - plain).norm() / plain.norm())))
        return reference(queries.float(), *others)


differences: list[tuple[float, float]] = []  # of loss and gradient, at each step of the plain runs


def plain_momentum(self: Executor, teachers: list[Any], students: list[Any], momentum: float) -> None:
    """One tensor after the other."""
    for teacher, student in zip(teachers, students, strict=True):
        teacher.data = teacher.data * momentum + student.data * (1 - momentum)


def nudge(method: torch.nn.Module) -> None:
    """Half of the weights, drawn, go to the next larger float."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in method.parameters():
            chosen = (torch.rand(weight.shape, generator=random) < 0.5).to(weight.device)
            weight.copy_(torch.where(chosen, weight.nextafter(torch.full_like(weight, torch.inf)), weight))


PLAIN = [mock.patch("sslrun.nn.heads.info_nce", plain_loss), mock.patch.object(Executor, "_move", plain_momentum)]
SIDES: dict[str, list[Any]] = {"fused": [], "plain": PLAIN, "nudged": PLAIN}


def curve(name: str, path: str, overrides: list[str], folder: Path) -> list[dict[str, Any]]:
    """The metrics of one run."""
    config = load(path, [*overrides, f"work_dir={folder}", "log.interval=10"])

    def built(config: Config) -> Recipe:
        recipe = build(config)
        if name == "nudged":
            nudge(recipe.model)
        return recipe

    with contextlib.ExitStack() as stack:
        for patch in (mock.patch("sslrun.train.build", built), *SIDES[name]):
            stack.enter_context(patch)
        assert run(config, None, "benchmarks/loss_curve.py") == 0
    (metrics,) = folder.rglob("metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def losses(curve: list[dict[str, Any]]) -> dict[int, float]:
    """Step -> logged loss."""
    return {entry["step"]: entry["train/loss"] for entry in curve if "train/loss" in entry}


if __name__ == "__main__":
    main()
