"""Accumulation that is exact for a loss that compares the samples of a batch, at the price of a second forward pass.

The gradient is cached at the embeddings (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup", arXiv 2101.06983): those of all micro-batches are computed without gradient, the loss compares them and
gives its gradient with respect to them, and a second pass of each micro-batch carries that on into the networks.
"""

from dataclasses import replace

from sslrun.contract import Batch, Loss, Progress
from sslrun.nn.norm import RunningStatistics
from sslrun.runtime import heartbeat
from sslrun.runtime.executor import Executor


def compared(executor: Executor, statistics: RunningStatistics, batches: list[Batch], progress: Progress) -> Loss:
    """The loss of all micro-batches of a step, whose gradient is added; see `Executor.caches_gradients`.

    Random draws are the same in both passes, and running statistics count the second one alone.
    """
    heartbeat.at("embedding")
    with statistics.untouched():
        joined = [tensor.requires_grad_() for tensor in executor.embed_all(batches, progress)]
    heartbeat.at("comparing")
    loss = executor.compare(joined, progress)
    executor.backward_whole(loss.value, joined)
    rows = [len(batch.index) for batch in batches]
    gradients = [tensor.new_zeros(()).expand_as(tensor) if tensor.grad is None else tensor.grad for tensor in joined]
    for batch, *gradient in zip(batches, *(tensor.split(rows) for tensor in gradients), strict=True):
        heartbeat.at("forward")
        embedded = executor.embed(batch, progress)
        heartbeat.at("backward")
        executor.backward_embedded(embedded, gradient)
    return replace(loss, value=loss.value.detach())
