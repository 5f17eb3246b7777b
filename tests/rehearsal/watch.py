"""Counts what a step does on fake CUDA tensors: waits of the host, launches, memory, and the least time they take."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rehearsal import played_torch_cuda
from rehearsal.played_torch_cuda import ALIGNMENT, ByStorage, PlayedEvent

aten: Any = torch.ops.aten

# The least time of a launch on an H100 (SXM). Rates are those of the data sheet, without sparsity; of the matrix rate
# large products reach the given share.
BANDWIDTH = 3.35e12  # bytes per second
RATES = {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12, torch.float64: 67e12}  # FLOP per second
MATRIX_SHARE = 0.6
LAUNCH_S = 2e-6

ROOT = str(Path(__file__).parents[2])
OWN_FILES = (__file__, played_torch_cuda.__file__)

# Operators whose result has a size, or whose caller needs a number, that only the device knows.
WAITING = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.equal.default,
    aten._linalg_eigh.default,
}
WITHOUT_LAUNCH = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.is_same_size.default,
    torch.ops.prim.device.default,
}
COPIES = ("aten::_to_copy", "aten::copy_")
TENSORS_PER_LAUNCH = 40  # of operators on lists of tensors: torch passes so many addresses in the arguments of a kernel


@dataclass
class Counts:
    """What was seen, with places as `file:line < file:line` from the inside out.

    Attributes:
        waits: places where the host waits for the device, with the operator.
        late_reads: places where the host waits for what an earlier step recorded.
        on_cpu: operators on CPU tensors, with their place.
        misplaced: CPU tensors among the operands of a launch, and strides that fused optimizers would mistake.
        float32_products: matrix products in float32, with their place: FLOP.
        launches: number of launches; views and allocations have none.
        bytes: read and written by all launches.
        flops: of convolutions and matrix products.
        roofline_s: sum of the least times of the launches.
        start_bytes: memory in use at the start of the step.
        peak_bytes: largest memory in use.
        by_operator: operator: (launches, least time in seconds).
    """

    waits: Counter[str] = field(default_factory=Counter)
    late_reads: Counter[str] = field(default_factory=Counter)
    on_cpu: Counter[str] = field(default_factory=Counter)
    misplaced: Counter[str] = field(default_factory=Counter)
    float32_products: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    bytes: int = 0
    flops: int = 0
    roofline_s: float = 0.0
    start_bytes: int = 0
    peak_bytes: int = 0
    by_operator: dict[str, tuple[int, float]] = field(default_factory=dict)


class Watch(TorchDispatchMode):
    """Watches operators.

    Tensors in host memory are real: the host computes with them. Tensors on the device are fake; where both meet, the
    host's become fake.

    Args:
        mode: the mode that is active.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.counts = Counts()
        self.packed = ByStorage()  # by the bounds of packed tokens, images and tokens of each size
        self._mode = mode
        self._held, self._in_use = ByStorage(), 0

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts the memory of tensors on the device until it is freed."""
        for tensor in tensors:
            if tensor.is_cuda and self._held.of(tensor) is None:
                size = -(-tensor.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
                self._in_use += size
                self._held.put(tensor, size, self._free)
        self.counts.peak_bytes = max(self.counts.peak_bytes, self._in_use)

    def start(self) -> None:
        """What is held now is what the step starts with."""
        self.counts.start_bytes = self.counts.peak_bytes = self._in_use

    def synchronized(self, event: PlayedEvent | None) -> None:
        """The host waits for an event, or for the device if it is None."""
        is_late = event is not None and event.age > 0
        (self.counts.late_reads if is_late else self.counts.waits)[f"synchronize {place()}"] += 1

    def launch(
        self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], flops: int = 0, n: int = 1
    ) -> None:
        """Counts a launch and its least time."""
        counts = self.counts
        for operand in inputs:  # a 0-d tensor on the host is passed as a number
            if operand.device.type == "cpu" and operand.dim() > 0 and name not in COPIES:
                counts.misplaced[f"{name} takes a CPU tensor {place()}"] += 1
        moved = {id(t): t.numel() * t.element_size() for t in (*inputs, *outputs) if t.is_cuda}
        size = sum(moved.values())
        dtype = next((t.dtype for t in inputs if t.is_floating_point()), torch.float32)
        seconds = max(size / BANDWIDTH, flops / (RATES[dtype] * MATRIX_SHARE), n * LAUNCH_S)
        if flops and dtype == torch.float32:
            counts.float32_products[f"{name} {place()}"] += flops
        counts.launches, counts.bytes, counts.flops = counts.launches + n, counts.bytes + size, counts.flops + flops
        counts.roofline_s += seconds
        before = counts.by_operator.get(name, (0, 0.0))
        counts.by_operator[name] = before[0] + n, before[1] + seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and func._can_decompose():  # only within an operator of ours
            with self:
                return func.decompose(*args, **kwargs)
        inputs = [leaf for leaf in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(leaf, Tensor)]
        is_of_device = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if not is_of_device and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return self._on_host(func, args, kwargs)
        if func is aten._local_scalar_dense.default:
            return self._number(args[0])
        self._look_for_waits(func, args, kwargs)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self.launch(func.name(), args[1:2], [])
            with unset_fake_temporarily():
                return args[0].zero_()  # what comes to the host are zeros
        if func.namespace == "sslkernels":
            return self._inside(func, args, kwargs)
        args, kwargs = pytree.tree_map_only(Tensor, self._faked, (args, kwargs))
        name = func.name()
        if name.startswith(("aten::_fused_sgd_", "aten::_fused_adam")):  # these have no fake form
            self._compare_strides(name, args)
            self.launch(name, inputs, [], n=_launches(args))
            return None
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self.hold(outputs)
        if func is aten._to_copy.default and not outputs[0].is_cuda:
            with unset_fake_temporarily():
                result = torch.zeros(outputs[0].shape, dtype=outputs[0].dtype)
        if func not in WITHOUT_LAUNCH and not _is_view(func, inputs, outputs):
            packed = [sizes for sizes in map(self.packed.of, inputs) if sizes] if func.namespace == "torch_attn" else []
            flops = packed_flops(func, args, packed[0]) if packed else _flops(func, args, kwargs, result)
            self.launch(name, inputs, outputs, flops, _launches(args))
        return result

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator on real tensors."""
        is_pinned = kwargs.get("pin_memory", False)
        with unset_fake_temporarily():
            result = func(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if is_pinned:
            played_torch_cuda.pinned.put(outputs[0], True)
        if any(output.dim() > 0 for output in outputs):  # 0-d tensors on the host are but numbers
            self.counts.on_cpu[f"{func.name()} {place()}"] += 1
        return result

    def _faked(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._mode.from_tensor(tensor)

    def _free(self, size: int) -> None:
        self._in_use -= size

    def _number(self, tensor: Tensor) -> Any:
        """A number of a tensor: `item`, `bool`, `int`, `float`, `tolist`."""
        if tensor.is_cuda:
            self.counts.waits[f"item {place()}"] += 1
        return False if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 0

    def _look_for_waits(self, func: Any, args: Any, kwargs: Any) -> None:
        waits, name = self.counts.waits, func.name()
        if func in WAITING or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
            waits[f"{name} {place()}"] += 1
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
            indices = [index for index in args[1] if index is not None]
            is_fill = func is not aten.index.Tensor and args[2].numel() == 1  # one number: masked_fill
            if any(index.dtype == torch.bool and index.is_cuda for index in indices) and not is_fill:
                waits[f"{name} by a mask {place()}"] += 1
            if any(not index.is_cuda for index in indices):
                waits[f"{name} by an index on the host {place()}"] += 1
        if func is aten._to_copy.default:
            # An asynchronous copy to the host gets pinned memory from torch.
            self._look_at_copy(args[0], torch.device(kwargs.get("device") or args[0].device), kwargs, True)
        if func is aten.copy_.default:
            target, source, *more = args
            options = {"non_blocking": more[0]} if more else kwargs
            lands = target.is_cuda or played_torch_cuda.pinned.of(target) is not None
            self._look_at_copy(source, target.device, options, lands)

    def _look_at_copy(self, source: Tensor, target: torch.device, options: Any, lands: bool) -> None:
        """A copy between host and device waits unless it is asynchronous, and one to memory that is not pinned always
        does. (One from memory that is not pinned returns when the driver has its own copy, and waits for nothing.)"""
        if source.device.type != target.type and not (options.get("non_blocking") and lands):
            path = f"{source.device.type} to {target.type}"
            self.counts.waits[f"copy {path} of {tuple(source.shape)} {place()}"] += 1

    def _inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs what an operator of ours does, which its registered fake form would hide; both must agree."""
        faked_args, faked_kwargs = pytree.tree_map_only(Tensor, self._faked, (args, kwargs))
        fake = func(*faked_args, **faked_kwargs)
        with self:
            result = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        for expected, found in zip(pytree.tree_leaves(fake), pytree.tree_leaves(result), strict=True):
            if isinstance(expected, Tensor):
                same = expected.shape == found.shape and expected.dtype == found.dtype
                assert same and expected.device == found.device, f"{func.name()}: fake {expected}, found {found}"
        self.hold(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _compare_strides(self, name: str, args: Any) -> None:
        """Fused updates walk parameter, gradient and state side by side through memory."""
        for place_in_list, parameter in enumerate(args[0]):
            for others in args[1:]:
                if not isinstance(others, list | tuple) or len(others) <= place_in_list:
                    continue
                other = others[place_in_list]
                if isinstance(other, Tensor) and other.dim() and not _same_layout(parameter, other):
                    strides = f"{tuple(parameter.shape)}: {parameter.stride()} and {other.stride()}"
                    self.counts.misplaced[f"{name}: strides differ, {strides}"] += 1


def place() -> str:
    """Lines of this project that are being executed, from the inside out; those of the backward pass are unknown."""
    frame, lines = sys._getframe(1), []
    while frame is not None and len(lines) < 3:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and file not in OWN_FILES and "site-packages" not in file:
            lines.append(f"{file.removeprefix(ROOT).removeprefix('/engine').strip('/')}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines) or "(autograd)"


def _same_layout(one: Tensor, other: Tensor) -> bool:
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return one.shape == other.shape and all(a == b for size, a, b in strides if size > 1)


def _launches(args: Any) -> int:
    """Launches of an operator: several if it takes a long list of tensors."""
    lists = [len(arg) for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    return 1 + max(lists, default=0) // TENSORS_PER_LAUNCH


def _is_view(func: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether the results are views of operands, and nothing was written."""
    if func._schema.is_mutable or not outputs:
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(output.untyped_storage()._cdata in storages for output in outputs)


def packed_flops(func: Any, args: Any, sizes: Sequence[tuple[int, int]]) -> int:
    """FLOP of attention within each image of packed tokens; torch counts all images as if they were the largest."""
    products, query = (2, args[0]) if func is torch.ops.torch_attn._varlen_attn.default else (5, args[1])
    return 2 * products * query.shape[1] * query.shape[2] * sum(images * tokens**2 for images, tokens in sizes)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    count = flop_registry.get(func._overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))
