"""The work of an optimizer step: its operators, counted on fake tensors, with their FLOP and bytes."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from sslrun.recipe import Recipe
from sslrun.rehearsal import rehearse

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
TENSORS_PER_LAUNCH = 40  # of operators on lists of tensors: torch passes so many addresses in the arguments of a kernel
aten: Any = torch.ops.aten
WITHOUT_WORK = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.is_same_size.default,
    torch.ops.prim.device.default,
}


@dataclass(frozen=True)
class TensorOf:
    """Shape, strides and dtype of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def filled(self) -> Tensor:
        """A tensor of this form on the CPU: normal random numbers, or zeros for integers."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        memory = torch.zeros(extent if 0 not in self.shape else 0, dtype=self.dtype)
        return (memory.normal_() if self.dtype.is_floating_point else memory).as_strided(self.shape, self.strides)


@dataclass(frozen=True)
class Call:
    """An operator with the form of its arguments; equal calls take equal time."""

    operator: Any
    leaves: tuple[Any, ...]
    structure: TreeSpec

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of this form, with tensors on the CPU."""
        leaves = [leaf.filled() if isinstance(leaf, TensorOf) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.structure)
        return args, kwargs


@dataclass(frozen=True)
class Operation:
    """What one call does.

    Attributes:
        phase: FORWARD, BACKWARD or UPDATE.
        call: the operator and its arguments.
        dtype: of the first floating-point operand.
        flops: of convolutions and matrix products; 0 for other operators.
        bytes: read and written.
        launches: kernels that a GPU starts for it.
    """

    phase: str
    call: Call
    dtype: torch.dtype
    flops: int
    bytes: int
    launches: int


Work = Counter[Operation]


def count(recipe: Recipe, precision: str, images: torch.dtype, groups: int) -> Work:
    """The operations of one micro-batch and of the optimizer's update, each with the number of its calls.

    Not counted are the FLOP inside of this project's own operators, which are losses over embeddings and updates.

    Args:
        recipe: a recipe.
        precision: "fp32" or "bf16".
        images: dtype of the views that the loader delivers.
        groups: number of BatchNorm groups of the micro-batch.

    Raises:
        UsageError: the parts of the model do not fit together.
    """
    watch = _Count()
    rehearse(recipe, precision, images, groups, watch)
    return watch.work


class _Count(TorchDispatchMode):
    """Counts the operators that run on fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.work: Work = Counter()
        self._phase = FORWARD

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch._C._current_graph_task_id() != -1:
            self._phase = BACKWARD
        elif self._phase == BACKWARD:
            self._phase = UPDATE
        leaves, structure = tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func in WITHOUT_WORK or _is_view(func, inputs, outputs):
            return result
        call = Call(func, tuple(_form(leaf) for leaf in leaves), structure)
        dtype = next((t.dtype for t in inputs if t.is_floating_point()), torch.float32)
        moved = {id(t): t.numel() * t.element_size() for t in (*inputs, *outputs)}
        self.work[
            Operation(
                phase=self._phase,
                call=call,
                dtype=dtype,
                flops=_flops(func, args, kwargs, result),
                bytes=sum(moved.values()),
                launches=_launches(args),
            )
        ] += 1
        return result


def of_phase(work: Work, phase: str) -> Work:
    """The operations of one phase."""
    return Counter({operation: times for operation, times in work.items() if operation.phase == phase})


def _form(leaf: Any) -> Any:
    return TensorOf(tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    # torch knows the attention of GPUs alone.
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _launches(args: Any) -> int:
    """Launches of an operator: several if it takes a long list of tensors."""
    lists = [len(arg) for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    return 1 + max(lists, default=0) // TENSORS_PER_LAUNCH


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether the results are views of operands, and nothing was written."""
    if func._schema.is_mutable or not outputs:
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(output.untyped_storage()._cdata in storages for output in outputs)
