"""The dtype of what must not be rounded: losses, keys and statistics."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is (`engine.precision = "fp64"`)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
