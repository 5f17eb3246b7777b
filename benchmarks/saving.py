"""Measures for how long a checkpoint holds up training: with the writer's thread, and without it.

    python benchmarks/saving.py [--cases mocov2_resnet50 vit_large] [--rounds 7] [--folder DIR]

Two ways alternate in one run, on a GPU if there is one, on the state of a step without the step itself:

    waiting     copy the state, contiguous; write, hash and sync it; go on (what sslrun did before it had the thread)
    thread      copy the state, go on; a thread writes, hashes and syncs the copy

Written are the median seconds for which the training loop stands, and those until the checkpoint is on the disk, with
the load of the machine. The disk is that of DIR. ViT-L takes 8 GB of memory and as much of the disk.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from rows import append_row, quantiles

from sslrun import run_state
from sslrun.config import load
from sslrun.contract import Method
from sslrun.methods.supervised import Supervised
from sslrun.nn.vit import VisionTransformer
from sslrun.recipe import Recipe
from sslrun.run_state import RunState
from sslrun.runtime import checkpoint
from sslrun.runtime.executor import Executor, LocalExecutor
from sslrun.runtime.host_copies import HostCopies
from sslrun.runtime.writer import Writer
from sslrun.session import build, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: the temporary folder)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in args.cases:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            row = measured(CASES[case](device), Path(folder), args.rounds)
        row = {"case": case, "device": device.type, **row, "load": [round(load, 1) for load in os.getloadavg()]}
        print(row)
        append_row("saving", row)


def measured(executor: Executor, folder: Path, rounds: int) -> dict[str, Any]:
    """A row of the two ways."""
    stands: dict[str, list[float]] = {"waiting": [], "thread": []}
    written: dict[str, list[float]] = {"waiting": [], "thread": []}
    run = run_of(executor, folder)
    for _ in range(rounds + 1):
        for way, at_once in (("waiting", save_waiting), ("thread", save)):
            run.step += 1
            begin = time.perf_counter()
            at_once(run)
            stands[way].append(time.perf_counter() - begin)
            run.writer.wait()
            written[way].append(time.perf_counter() - begin)
    (newest,) = checkpoint.steps(folder).values()
    size = sum(file.stat().st_size for file in newest.iterdir())
    return {
        "gbytes": round(size / 1e9, 2),
        "stands_s": {way: quantiles(seconds[1:]) for way, seconds in stands.items()},  # the first warms up
        "written_s": {way: quantiles(seconds[1:]) for way, seconds in written.items()},
    }


def save_waiting(run: Any) -> None:
    """How a run was saved before."""
    run.executor.check()
    tensors = {"model": run.executor.full_state(), "optimizer": run.executor.optimizer_state()}
    run_state.save(run.folder.checkpoints, tensors, RunState(run.step, run.plan.num_samples, {}, {}))
    checkpoint.prune(run.folder.checkpoints, run.recipe.checkpoint.max_keep_ckpts)


def run_of(executor: Executor, folder: Path) -> Any:
    """What `save` uses of a run; the checkpoint before is deleted, as in a run that has enough of them."""
    return SimpleNamespace(
        step=0,
        executor=executor,
        writer=Writer(),
        copies=HostCopies(),
        loader=SimpleNamespace(bad=SimpleNamespace(state_dict=dict)),
        step_metrics=SimpleNamespace(state=dict),
        plan=SimpleNamespace(num_samples=1),
        recipe=SimpleNamespace(checkpoint=SimpleNamespace(max_keep_ckpts=1)),
        folder=SimpleNamespace(checkpoints=folder, look=lambda: None),
        log=SimpleNamespace(sync=lambda: None),
        images=None,
        is_measured=True,
    )


def mocov2_resnet50(device: torch.device) -> Executor:
    """The recipe: encoder, momentum encoder, queue of 65,536 and the momentum of SGD."""
    recipe: Recipe = build(load(ROOT / "configs/mocov2.toml"))
    recipe.model.prepare(1_281_167)
    optimizer = recipe.optimizer.create(recipe.model.named_parameters())
    return with_state(recipe.model, optimizer, device, ("momentum_buffer",))


def vit_large(device: torch.device) -> Executor:
    """A ViT-L/16 with AdamW, without a teacher."""
    method = Supervised(VisionTransformer(embed_dim=1024, depth=24, num_heads=16), num_classes=1000)
    optimizer = torch.optim.AdamW(method.parameters())
    return with_state(method, optimizer, device, ("exp_avg", "exp_avg_sq"))


def with_state(
    method: Method, optimizer: torch.optim.Optimizer, device: torch.device, keys: tuple[str, ...]
) -> Executor:
    """An executor whose optimizer has the state of a step that was done."""
    executor = LocalExecutor(method, optimizer, device=device)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {key: torch.randn_like(parameter) for key in keys}
    return executor


CASES = {"mocov2_resnet50": mocov2_resnet50, "vit_large": vit_large}

if __name__ == "__main__":
    main()
