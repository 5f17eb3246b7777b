"""Functions on tensors for the hot operations of self-supervised training, one file per operation.

The package does not depend on sslrun and imports only torch and triton. Each kernel has a benchmark row that justifies
it.
"""

from sslkernels.bank_nce import bank_nce
from sslkernels.batch_nce import batch_nce
from sslkernels.ema_update import ema_update_
from sslkernels.info_nce import info_nce
from sslkernels.lars_update import lars_update_, square_sums
from sslkernels.nt_xent import nt_xent
from sslkernels.prototype_cross_entropy import prototype_cross_entropy
from sslkernels.sinkhorn import sinkhorn, sinkhorn_center
from sslkernels.soft_cross_entropy import soft_cross_entropy
from sslkernels.views import write_views

__all__ = [
    "bank_nce",
    "batch_nce",
    "ema_update_",
    "info_nce",
    "lars_update_",
    "nt_xent",
    "prototype_cross_entropy",
    "sinkhorn",
    "sinkhorn_center",
    "soft_cross_entropy",
    "square_sums",
    "write_views",
]
