"""The metrics of a step, from those of its micro-batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sslrun.contract import Loss, Pooled
from sslrun.runtime import distributed


@torch.no_grad()
def of_a_step(losses: Sequence[Loss]) -> dict[str, Tensor]:
    """The loss and the metrics of a step, 0-d on the device, float32 (float64 if the loss is). The host does not wait.

    All ranks call it.

    Args:
        losses: of this rank's micro-batches, whose numbers of samples are equal.

    Returns:
        Means over the micro-batches, which are means over this rank's samples where a metric is a mean over those of a
        micro-batch. A `Pooled` metric is that of the global batch, on every rank.
    """
    named = [{"loss": loss.value, **loss.metrics} for loss in losses]
    dtype = torch.promote_types(losses[0].value.dtype, torch.float32)
    metrics = {}
    for name, first in named[0].items():
        if isinstance(first, Pooled):
            sums = torch.stack([one[name].sums for one in named]).sum(dim=0)  # type: ignore[union-attr]
            metrics[name] = first.value(distributed.all_gather_rows(sums.unsqueeze(0)).sum(dim=0)).to(dtype)
        else:
            metrics[name] = torch.stack([one[name].to(dtype) for one in named]).mean()  # type: ignore[union-attr]
    return metrics
