"""The method's loss on held-out images, like mmcv's workflow `("val", 1)`.

It is the loss that training would have on these images, with the views, batches and BatchNorm groups of the recipe and
the networks in training mode, so the difference between `train/loss` and `val/loss` shows what the network has
memorized. (In evaluation mode BatchNorm would use running statistics, and losses that compare the samples of a batch
would change their scale.) Every measurement uses the same images in the same crops, on one process or many.
"""

import contextlib
from collections.abc import Iterator

import torch

from sslrun.contract import Method
from sslrun.errors import UsageError
from sslrun.evaluation.monitors.monitor import Monitor, Snapshot
from sslrun.runtime import distributed
from sslrun.runtime.metrics import of_a_step
from sslrun.runtime.stopping import stoppable


class HeldOutLoss(Monitor):
    """The method's loss on the held-out images, `val/loss`, and its other metrics, `val/...`.

    It is computed as in training: with the recipe's views and batches, and the networks in training mode.
    """

    needs_held_out = True

    def check(self, method: Method, key: str) -> None:
        if method.remembers_samples:
            raise UsageError(
                f"{key} is set, but {type(method).__name__} has no loss on images that it does not train on, since it "
                "has state for each training image; set it to 0"
            )

    def measure(self, snapshot: Snapshot) -> dict[str, float]:
        """Means over the batches and ranks."""
        executor, progress = snapshot.executor, snapshot.progress
        assert snapshot.held_out_batches is not None
        metrics = []
        with untouched(executor.method, executor.device):
            for batches in stoppable(snapshot.held_out_batches()):
                targets = executor.targets(batches, progress)
                if executor.caches_gradients:
                    losses = [executor.compare(executor.embed_all(batches, progress), progress)]
                else:
                    losses = [
                        executor.forward(batch, progress, target)
                        for batch, target in zip(batches, targets, strict=True)
                    ]
                metrics.append(of_a_step(losses))  # copies, see `Executor`
        means = {name: torch.stack([each[name] for each in metrics]).mean() for name in metrics[0]}
        distributed.all_reduce_mean_(list(means.values()))
        return {f"val/{name}": mean.item() for name, mean in means.items()}


@contextlib.contextmanager
def untouched(method: Method, device: torch.device) -> Iterator[None]:
    """Undoes the effects of forward passes within it: no gradient is recorded, and buffers and random state are
    restored.

    This covers the statistics of BatchNorm, and buffers that a user's own method replaces.
    """
    before = {name: (buffer, buffer.clone()) for name, buffer in method.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for name, (buffer, value) in before.items():
                buffer.copy_(value)
                owner, _, attribute = name.rpartition(".")
                setattr(method.get_submodule(owner), attribute, buffer)  # the method may have replaced it
