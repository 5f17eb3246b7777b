"""InfoNCE among the keys of the batch (MoCo v3: Chen, Xie & He 2021, arXiv 2104.02057, eq. 1 and algorithm 1).

    loss_i = -log( exp(q_i.k_i+ / T) / sum_j exp(q_i.k_j / T) ),   q_i = queries_i / |queries_i|

The sum runs over the keys of all ranks, including the query's own key k_i+. One pass over the keys, as in
`sslkernels.info_nce`.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sslkernels.arguments import check_index, check_matrix, check_no_gradient, check_one_device, check_positive
from sslkernels.collective import gather_rows
from sslkernels.contrast import contrast
from sslkernels.device import outside_autocast
from sslkernels.gradient import with_gradient


@outside_autocast
def batch_nce(
    queries: Tensor,
    keys: Tensor,
    positive_index: Tensor,
    temperature: float,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """InfoNCE loss of each query with its own key as positive and all other keys as negatives.

    Products use the dtype of the queries (of the keys if only those are a 16-bit type); everything else is float32. A
    zero query has similarity 0 to all keys and gets no gradient. The caller applies MoCo v3's factor 2T.

    Args:
        queries: (B, D), normalized inside; they get the gradient.
        keys: (K, D), normalized rows. No gradient: they come from a momentum encoder.
        positive_index: (B,) int64, row of each query's own key among the keys of all ranks in rank order.
        temperature: T, above 0.
        group: process group whose keys are gathered, equally many per rank; None: this process alone.

    Returns:
        The mean over this rank's queries, 0-d, float32 (float64 for float64 queries). Averaging its gradients over
        ranks gives the gradient of the mean over all queries.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device.
    """
    check_matrix("queries", queries)
    check_matrix("keys", keys, columns=queries.shape[1])
    check_one_device(queries=queries, keys=keys, positive_index=positive_index)
    check_no_gradient("only queries get one", keys=keys)
    check_positive("temperature", temperature)
    keys = gather_rows(keys, group)
    check_index("positive_index", positive_index, (len(queries),), len(keys))
    needs_gradient = torch.is_grad_enabled() and queries.requires_grad
    losses, gradients = _batch_nce(queries.detach(), keys, positive_index, temperature, needs_gradient)
    return (with_gradient(losses, queries, gradients) if needs_gradient else losses).mean()


def reference(queries: Tensor, keys: Tensor, positive_index: Tensor, temperature: float) -> Tensor:
    """`batch_nce` for one process in plain PyTorch, with all B x K logits."""
    return F.cross_entropy(F.normalize(queries, dim=1) @ keys.T / temperature, positive_index)


@torch.library.custom_op("sslkernels::batch_nce", mutates_args=())
def _batch_nce(
    queries: Tensor, keys: Tensor, positive_index: Tensor, temperature: float, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    positives = keys[positive_index]
    losses, gradients, _ = contrast(queries, positives, keys, positive_index.unsqueeze(1), temperature, needs_gradient)
    return losses, gradients


@_batch_nce.register_fake
def _(
    queries: Tensor, keys: Tensor, positive_index: Tensor, temperature: float, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    losses = queries.new_empty(len(queries), dtype=torch.promote_types(queries.dtype, torch.float32))
    return losses, losses.new_empty(queries.shape if needs_gradient else (0,))
