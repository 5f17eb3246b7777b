"""The executor for several processes in float64, which DeepSpeed refuses on the CPU: plain data parallelism."""

from typing import Any

import torch
from torch import Tensor

from sslrun.contract import Method
from sslrun.runtime import distributed
from sslrun.runtime.executor import Executor, LocalExecutor


class ReplicatedExecutor(LocalExecutor):
    """Every process holds everything whole, as `LocalExecutor`, and all average their gradients after a step."""

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        Executor.__init__(self, method, optimizer, **options)
        distributed.broadcast_(list(method.state_dict(keep_vars=True).values()))

    def _gradients(self) -> dict[str, Tensor]:
        gradients = super()._gradients()
        distributed.all_reduce_mean_(list(gradients.values()))
        return gradients

    def _norm_share(self) -> float:
        return 1.0 / distributed.world_size()
