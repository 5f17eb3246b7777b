"""Peak memory of a call, counted from its tensors."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Peak(TorchDispatchMode):
    """A context in which `bytes` is the peak memory of all tensors created since it was entered.

    Memory that an operator allocates internally is not counted. To look into a custom operator, call its `_init_fn`.
    """

    def __init__(self, *known: Tensor) -> None:
        """`known`: existing tensors, whose views are not counted."""
        super().__init__()
        self.bytes = 0
        self._known = {x.untyped_storage().data_ptr() for x in known}
        self._alive: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._alive += [weakref.ref(x) for x in (result if isinstance(result, (tuple, list)) else [result])
                        if isinstance(x, Tensor)]  # fmt: skip
        self._alive = [reference for reference in self._alive if reference() is not None]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (r() for r in self._alive)}
        self.bytes = max(self.bytes, sum(size for place, size in storages.items() if place not in self._known))
        return result
