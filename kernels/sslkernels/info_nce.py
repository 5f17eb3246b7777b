"""InfoNCE against a queue (van den Oord et al. 2018, arXiv 1807.03748, eq. 4; He et al. 2020, arXiv 1911.05722, eq. 1).

    loss_i = -log( exp(q_i.p_i / T) / (exp(q_i.p_i / T) + sum_j exp(q_i.u_j / T)) ),   q_i = queries_i / |queries_i|

One pass over the queue gives loss, gradient and accuracy (`sslkernels.contrast`); no B x K tensor is created.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.arguments import check_matrix, check_no_gradient, check_one_device, check_positive
from sslkernels.contrast import contrast
from sslkernels.device import outside_autocast
from sslkernels.gradient import with_gradient


@outside_autocast
def info_nce(
    queries: Tensor,
    positives: Tensor,
    queue: Tensor,
    temperature: float,
    *,
    reduction: Literal["mean", "none"] = "mean",
) -> tuple[Tensor, Tensor]:
    """InfoNCE loss of each query with one positive and the rows of a queue as negatives.

    Products use the dtype of the queries (of the queue if only that is a 16-bit type); everything else is float32. A
    zero query has similarity 0 to all rows and gets no gradient.

    Args:
        queries: (B, D), normalized inside; they get the gradient.
        positives: (B, D), normalized rows; row i belongs to query i. No gradient.
        queue: (K, D), normalized rows, shared by all queries. No gradient.
        temperature: T, above 0.
        reduction: "mean" over the rows, or "none".

    Returns:
        The loss, 0-d or (B,); and the share of queries that are closer to their positive than to every row of the
        queue, 0-d. Both are float32 (float64 for float64 queries).

    Raises:
        ValueError: an argument of the wrong shape, dtype or device.
    """
    check_matrix("queries", queries)
    check_matrix("positives", positives, rows=len(queries), columns=queries.shape[1])
    check_matrix("queue", queue, columns=queries.shape[1])
    check_one_device(queries=queries, positives=positives, queue=queue)
    check_no_gradient("only queries get one", positives=positives, queue=queue)
    check_positive("temperature", temperature)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
    needs_gradient = torch.is_grad_enabled() and queries.requires_grad
    losses, gradients, hits = _info_nce(queries.detach(), positives, queue, temperature, needs_gradient)
    if needs_gradient:
        losses = with_gradient(losses, queries, gradients)
    return losses.mean() if reduction == "mean" else losses, hits.mean()


def reference(
    queries: Tensor, positives: Tensor, queue: Tensor, temperature: float, *, reduction: str = "mean"
) -> tuple[Tensor, Tensor]:
    """`info_nce` in plain PyTorch, with all B x (1 + K) logits."""
    queries = F.normalize(queries, dim=1)
    logits = torch.cat([(queries * positives).sum(dim=1, keepdim=True), queries @ queue.T], dim=1)
    hits = logits[:, 0] > logits[:, 1:].amax(dim=1)
    loss = F.cross_entropy(logits / temperature, torch.zeros_like(hits, dtype=torch.long), reduction=reduction)
    return loss, hits.to(loss.dtype).mean()


@torch.library.custom_op("sslkernels::info_nce", mutates_args=())
def _info_nce(
    queries: Tensor, positives: Tensor, queue: Tensor, temperature: float, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return contrast(queries, positives, queue, None, temperature, needs_gradient)


@_info_nce.register_fake
def _(
    queries: Tensor, positives: Tensor, queue: Tensor, temperature: float, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = queries.new_empty(len(queries), dtype=torch.promote_types(queries.dtype, torch.float32))
    return rows, rows.new_empty(queries.shape if needs_gradient else (0,)), torch.empty_like(rows)
