"""The method's own loss on images that are not trained on: what mmcv's workflow `("val", 1)` is for.

It is the loss that training would have on these images: the views, batches and BatchNorm groups of the recipe, the
networks in training mode. What lies between `train/loss` and `val/loss` is then what was learned by heart and nothing
else. (In evaluation mode BatchNorm would normalize with running statistics, and a loss that compares the samples of a
batch would be on another scale.) Every measurement sees the same images in the same crops, on one process or many.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from sslrun.contract import Method, Progress
from sslrun.data import Loader
from sslrun.evaluation.monitor import MonitorConfig
from sslrun.runtime import distributed
from sslrun.runtime.executor import Executor


class HeldOutLoss:
    """A monitor of it.

    Args:
        config: the `[monitor]` table.
        loader: of the held-out images, in the recipe's views.
        cursor: (epoch, positions) of this rank's micro-batches, of whole global batches one after the other.
        accumulation: how many of them each global batch has.
    """

    def __init__(
        self, config: MonitorConfig, loader: Loader, cursor: Sequence[tuple[int, np.ndarray]], accumulation: int
    ) -> None:
        self.config, self.loader, self.cursor, self.accumulation = config, loader, cursor, accumulation

    def measure(self, executor: Executor, progress: Progress) -> dict[str, float]:
        """`val/loss` and the method's other metrics, means over batches and ranks, if they are due."""
        if not self.config.is_due(self.config.loss_interval, progress):
            return {}
        seen = []
        with contextlib.closing(self.loader.run(self.cursor)) as stream, untouched(executor.method, executor.device):
            while batches := list(itertools.islice(stream, self.accumulation)):
                for batch, target in zip(batches, executor.targets(batches, progress), strict=True):
                    loss = executor.forward(batch, progress, target)
                    seen.append({"loss": loss.value, **loss.metrics})
        means = {name: torch.stack([each[name].float() for each in seen]).mean() for name in seen[0]}
        distributed.all_reduce_mean_(list(means.values()))
        return {f"val/{name}": mean.item() for name, mean in means.items()}


@contextlib.contextmanager
def untouched(method: Method, device: torch.device) -> Iterator[None]:
    """Forward passes within it leave no trace: no gradient, and buffers and random state as they were.

    BatchNorm gathers statistics, and a method of a user's own may do as it likes: what counts is what it finds again.
    """
    before = {name: (buffer, buffer.clone()) for name, buffer in method.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
        for name, (buffer, value) in before.items():
            buffer.copy_(value)
            owner, _, attribute = name.rpartition(".")
            setattr(method.get_submodule(owner), attribute, buffer)  # it may have been replaced
