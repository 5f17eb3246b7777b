"""Rehearses what follows DALI on the device: `python -m rehearsal.data_path [--fault FAULT]... NAME...`.

For each recipe, by its name, and each mode, batches go through `Loader._batches` (exact stage, copies of ids and of
labels, event) and through `BatchStream` (the hand-over to the stream of the step). Decoding and DALI's operators are
left out: their outputs are fake tensors of the right shapes. With faults, only these are planted, one after the other.
Prints a line of JSON for each.
"""

import argparse
import contextlib
import json
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rehearsal import played_torch_cuda
from rehearsal.played_torch_cuda import DEVICE, PlayedStream
from rehearsal.step import watching
from rehearsal.watch import Watch
from sslrun import session
from sslrun.config import load
from sslrun.contract import Batch
from sslrun.data.graph import graph_plan
from sslrun.data.loader import BatchStream, Loader
from sslrun.data.order import Order
from sslrun.data.pipeline import BatchSpec

BATCH, SAMPLES, SIDE = 32, 256, 400


class PlayedSource:
    """An opened source of JPEGs of one size, with labels."""

    is_decoded = has_bands = False
    channels = 3
    names = tuple(f"{sample}.jpg" for sample in range(SAMPLES))
    sizes = np.full((SAMPLES, 2), SIDE, dtype=np.int32)
    labels = np.zeros(SAMPLES, dtype=np.int64)

    def __len__(self) -> int:
        return SAMPLES

    def sizes_of(self, ids: np.ndarray) -> np.ndarray:
        return self.sizes[ids]

    def labels_of(self, ids: np.ndarray) -> np.ndarray:
        return self.labels[ids]


def played_outputs(loader: Loader, specs: Iterator[BatchSpec]) -> Iterator[tuple[BatchSpec, list[list[torch.Tensor]]]]:
    """What DALI delivers: for each output of the graph a tensor of all images, or one for each where sizes differ."""
    for spec in specs:
        batch = len(spec.ids)
        plan = graph_plan(loader.views, loader.dali_steps)
        outputs = [] if all(part.steps for part in plan) else [[_pixels(SIDE, SIDE) for _ in range(batch)]]
        for group, part in zip(loader.views, plan, strict=True):
            if part.steps and part.steps[-1].is_frames:
                outputs.append([_pixels(batch, group.num_views, *group.size)])
            elif part.steps:
                outputs += [[_pixels(batch, *group.size)] for _ in range(part.steps[-1].branches)]
        yield spec, outputs


def _pixels(*size: int) -> torch.Tensor:
    return torch.empty(*size, 3, dtype=torch.uint8, device=DEVICE)


def rehearse(name: str, augment: Any) -> dict[str, Any]:
    """Counts of the second of two batches, and what is wrong with its hand-over."""
    recipe = session.build(load(f"configs/{name}.toml"))
    source: Any = PlayedSource()
    loader = Loader(
        source,
        recipe.data.views,
        sampler=Order(SAMPLES, 0),
        seed=0,
        batch_size=BATCH,
        device=DEVICE,
        augment=augment,
        dtype=torch.bfloat16,
    )
    cursor = [(0, np.arange(first, first + BATCH)) for first in (0, BATCH)]
    pipeline = loader._pipeline(loader.dali_steps)
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    specs = (pipeline._spec(*at) for at in cursor)
    played: Any = types.SimpleNamespace(run=lambda cursor, stream, go_on: played_outputs(loader, specs))
    counts, told = None, []
    with (
        mode,
        mock.patch.object(loader, "_pipeline", lambda steps: played),
        mock.patch("sslrun.data.loader._tensors", lambda output: output),
    ):
        batches = loader._batches(iter(cursor))
        for _ in cursor:
            played_torch_cuda.next_step()
            with watching(Watch(mode)) as watch:
                batch, ready = next(batches)
                counts = watch.counts
            told += hand_over(loader, batch, ready)
    assert counts is not None
    return {"case": f"{name}, {augment}", "problems": told, **vars(counts)}


def hand_over(loader: Loader, batch: Batch, ready: Any) -> list[str]:
    """What is wrong with the way of a batch from the loader's stream to the current one."""
    tensors = [*batch.views, batch.index, *([] if batch.label is None else [batch.label])]
    told = [f"a tensor {tuple(each.shape)} of the batch is on {each.device}" for each in tensors if not each.is_cuda]
    for view in batch.views:
        if not view.permute(0, 2, 3, 1).is_contiguous():
            told.append(f"views {tuple(view.shape)} have strides {view.stride()}, not those of channels-last")
    step_stream = PlayedStream()
    made = mock.patch.object(loader, "_batches", lambda cursor, go_on: iter([(batch, ready)]))
    with made, torch.cuda.stream(step_stream):
        taken = next(BatchStream(loader, iter([])))
    if ready.stream is None or ready.stream in (step_stream, torch.cuda.default_stream()):
        told.append("the event is not one of the loader's own stream")
    if ready not in step_stream.waits_for:
        told.append("the step's stream does not wait for the batch")
    for tensor in (*taken.views, taken.index, *([] if taken.label is None else [taken.label])):
        if played_torch_cuda.used_by.of(tensor) is not step_stream:
            told.append(f"a tensor {tuple(tensor.shape)} may be freed while the step's stream reads it")
    return told


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """A hand-over that forgets something, or a copy that is waited for."""
    move = torch.Tensor.to
    owner, name, function = {
        "wait_event": (PlayedStream, "wait_event", lambda stream, event: None),
        "record_stream": (torch.Tensor, "record_stream", lambda tensor, stream: None),
        "copy": (torch.Tensor, "to", lambda tensor, *to, **options: move(tensor, *to)),
    }[fault]
    with mock.patch.object(owner, name, function):
        yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+")
    parser.add_argument("--fault", action="append", default=[])
    args = parser.parse_args()
    for name in args.names:
        for fault in args.fault:
            with planted(fault):
                print(json.dumps({"fault": fault, **rehearse(name, "exact")}), flush=True)
        for augment in () if args.fault else ("exact", "dali"):
            print(json.dumps(rehearse(name, augment)), flush=True)


if __name__ == "__main__":
    main()
