"""A number on its way from the device to the host, to be read when it has certainly arrived: one step later."""

from typing import Any

import torch
from torch import Tensor


class LateValue:
    """A 0-d tensor that is being copied from the device to the host.

    `read` waits for the work that was queued on the device before this object was made, and for nothing after it. So
    the host should not read in the same step.

    Args:
        value: 0-d; later changes of it are not seen.
    """

    def __init__(self, value: Tensor) -> None:
        self._host = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        self._host.copy_(value, non_blocking=True)
        self._arrived = torch.cuda.Event() if value.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Any:
        """The number."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.item()
