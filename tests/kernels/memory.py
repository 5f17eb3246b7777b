"""How much memory a call takes at once, counted in tensors."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Peak(TorchDispatchMode):
    """Within it, `bytes` is the most that tensors made since it began held at once.

    What operators allocate within themselves is not seen, nor what is inside a custom operator: call its `_init_fn`.
    """

    def __init__(self, *known: Tensor) -> None:
        """`known`: tensors from before, whose views do not count."""
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
