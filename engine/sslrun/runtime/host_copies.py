"""Copies of a run's tensors in host memory, which stay as they are while training goes on."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class HostCopies:
    """Copies tensors: `begin`, a call for each tensor, `finish`.

    Copies of CUDA tensors lie in page-locked buffers, so that the host does not wait for each of them. The buffers are
    kept, and used by the next copies. Copies of other tensors take new memory, which is free when nobody holds them.
    """

    def __init__(self) -> None:
        self._free: dict[Any, list[Tensor]] = defaultdict(list)
        self._used: list[tuple[Any, Tensor]] = []
        self._devices: set[torch.device] = set()
        self._are_whole = True

    def begin(self) -> None:
        """Begins a new set of copies; those of the set before are overwritten."""
        for kind, buffer in self._used:
            self._free[kind].append(buffer)
        self._used, self._devices, self._are_whole = [], set(), True

    def __call__(self, tensor: Tensor) -> Tensor:
        """A copy with the same strides, if they leave no gaps. It is complete after `finish`. If the memory for it
        cannot be had, the tensor itself."""
        tensor = tensor.detach()
        try:
            copy = self._memory(tensor)
        except (MemoryError, RuntimeError):  # torch's allocators raise the latter
            self._are_whole = False
            return tensor
        return copy.copy_(tensor, non_blocking=tensor.is_cuda)

    def finish(self) -> bool:
        """Waits for the copies. False if a tensor has none: then the state must be written before it changes."""
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
        return self._are_whole

    def _memory(self, tensor: Tensor) -> Tensor:
        """Memory for a copy: of a CUDA tensor, a buffer that this set has not used yet."""
        if not tensor.is_cuda:
            return torch.empty_like(tensor, device="cpu")
        kind = tensor.dtype, tensor.shape, tensor.stride()
        buffer = self._free[kind].pop() if self._free[kind] else torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._used.append((kind, buffer))
        self._devices.add(tensor.device)
        return buffer


def to_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU, at once and contiguous."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
