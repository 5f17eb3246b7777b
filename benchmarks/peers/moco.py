"""A step of MoCo as lightly's documentation has it, with a recipe's network, optimizer and batch; see `../peer.py`.

The first line on stdin has the `config` and its `overrides`; each further one, {"steps": n}, is answered with the
seconds of a step (`step.py` says which).
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    job = json.loads(sys.stdin.readline())
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    try:
        run = side(job)
    except ImportError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        return
    print(json.dumps({"ready": "lightly"}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line)["steps"])), file=answers, flush=True)


def side(job: dict[str, Any]) -> Any:
    """A function that runs a number of steps and returns the seconds of one."""
    from loaders import torch_without_torchvision_kernels

    torch_without_torchvision_kernels()
    import step
    import torch
    from engine_step import random_batch, set_up
    from lightly.loss import NTXentLoss
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    from sslrun.config import load
    from sslrun.plan import choose_machine
    from sslrun.runtime import heartbeat
    from sslrun.session import build

    device = torch.device("cpu")
    recipe = build(load(job["config"], job["overrides"]))
    machine = choose_machine(recipe, device, 1, 1)
    set_up(machine, device)
    model = recipe.model
    step.use_plain_batch_norm(model)
    model.to(memory_format=torch.channels_last)
    optimizer = recipe.optimizer.create(model.named_parameters())
    query = torch.nn.Sequential(model.backbone, step.LastMap(), model.neck)
    key = torch.nn.Sequential(model.key_backbone, step.LastMap(), model.key_neck)
    deactivate_requires_grad(key)
    criterion = NTXentLoss(temperature=model.head.temperature, memory_bank_size=tuple(model.queue.rows.shape))
    first, second = random_batch(recipe, machine, device).crops()
    mark = heartbeat.at

    def run() -> None:
        mark("momentum")
        update_momentum(query, key, m=model.momentum)
        mark("forward")
        queries = query(first)
        mark("targets")
        with torch.no_grad():
            keys = key(second)
        mark("forward")
        loss = criterion(queries, keys)
        mark("backward")
        loss.backward()
        mark("update")
        optimizer.step()
        optimizer.zero_grad()
        mark("before the step")

    return step.own_side(run, device)


if __name__ == "__main__":
    main()
