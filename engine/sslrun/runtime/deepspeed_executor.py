"""The executor for several processes: DeepSpeed, ZeRO stages 0 to 3. The only file that imports DeepSpeed.

DeepSpeed shards, gathers, and averages gradients. The engine itself averages those of stage 1 (`_average_parts`), and
handles the boundary of accumulation, autocast (DeepSpeed's `torch_autocast` would also average the gradients of
convolutions in bfloat16), the finite check and clipping (before DeepSpeed's step, on the averaged gradients that each
rank holds), and state, which is saved and loaded unsharded. Of DeepSpeed's internals this file knows which part of
which parameter a flat partition holds, and where (`_read_partitions`).
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from sslkernels.ema_update import ema_update_
from sslrun.contract import Loss, Method, PartitionedOptimizer, Progress
from sslrun.errors import UsageError
from sslrun.runtime import distributed
from sslrun.runtime.executor import COUNTER, Copy, Executor, counter_device
from sslrun.runtime.host_copies import to_cpu

T = TypeVar("T")
LARGEST_BUCKET = 50_000_000  # largest number of elements averaged at once; DeepSpeed allocates a buffer of that size


@dataclass(frozen=True)
class Segment:
    """`length` elements of a parameter, from its element `start`, lie at `offset` of a flat partition."""

    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class Partition:
    """A flat tensor that the optimizer updates in place of a group of parameters.

    Attributes:
        flat: this rank's flat tensor.
        group: the optimizer's parameter group.
        names: names of all parameters of the group.
        segments: for each rank, the segment of each parameter of which it holds anything.
    """

    flat: Tensor
    group: dict[str, Any]
    names: list[str]
    segments: list[dict[str, Segment]]

    @property
    def own(self) -> dict[str, Segment]:
        return self.segments[distributed.rank()]

    def fill(self, flat: Tensor, name: str, value: Tensor) -> None:
        """Set this rank's part of a parameter in `flat` (weights or state) from the whole value."""
        segment = self.own.get(name)
        if segment is not None:
            part = value.flatten()[segment.start : segment.start + segment.length]
            flat[segment.offset : segment.offset + segment.length].copy_(part)


class DeepSpeedExecutor(Executor):
    """As `Executor`.

    Args:
        zero_stage: 0 replicates everything, 1 shards optimizer state, 2 gradients too, 3 parameters too.
        zero_options: further keys of DeepSpeed's `zero_optimization`.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        *,
        zero_stage: int,
        zero_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(method, optimizer, **options)
        self.zero_stage = zero_stage
        self._shapes = {parameter: parameter.shape for parameter in self.names}
        self._is_applied = True
        self._kept: list[tuple[nn.Parameter, Tensor]] = []  # gradients that the last backward pass of a step adds
        self._hold_back_steps()
        distributed.broadcast_(list(method.buffers()))
        self.engine = _initialize(
            _WholeStep(method, self._autocast), optimizer, self.device, self._config(zero_options or {})
        )
        if zero_stage == 1:
            self._leave_gradients()
        if zero_stage == 0:  # the others keep parameters as pieces of flat tensors
            method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._by_name = {name: parameter for parameter, name in self.names.items()}
        self._partitions = self._read_partitions()
        if zero_stage > 0 and isinstance(optimizer, PartitionedOptimizer):
            optimizer.set_segments(
                {partition.flat: _own_lengths(partition) for partition in self._partitions},
                distributed.all_reduce_sum_,
            )

    def _run(self, compute: Callable[[], T]) -> T:
        result: T = self.engine(compute)
        return result

    def _loss_of(self, compute: Callable[[], Loss]) -> Loss:
        losses: list[Loss] = []

        def value() -> Tensor:
            losses.append(compute())
            return losses[0].value

        number = self._run(value)
        losses[0].value = number  # the same number, with DeepSpeed's hooks on it
        return losses[0]

    @torch.no_grad()
    def write_parameter(self, parameter: Any, value: Tensor) -> None:
        value = value.to(self.device)
        if self.zero_stage < 3 or parameter.ds_status.name == "AVAILABLE":
            parameter.copy_(value)
        if self.zero_stage == 3:
            _fill_part(parameter, value)
        for partition in self._partitions:
            partition.fill(partition.flat, self.names[parameter], value)

    def optimizer_state(self, copy: Copy = to_cpu) -> dict[str, Tensor]:
        if self.zero_stage == 0:
            return super().optimizer_state(copy)
        state: dict[str, Tensor] = {}
        for partition in self._partitions:
            for key, value in self.optimizer.state.get(partition.flat, {}).items():
                if key == COUNTER:
                    state |= {f"{name}/{key}": value.detach().cpu().clone() for name in partition.names}
                elif value is not None:
                    state |= {f"{name}/{key}": whole for name, whole in self._gather(partition, value)}
        return state if distributed.rank() == 0 else {}

    @torch.no_grad()
    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        if self.zero_stage == 0:
            super().load_optimizer_state(state)
            return
        by_name = self._by_parameter(state)
        for partition in self._partitions:
            flat_state: dict[str, Tensor] = {}
            for name in partition.names:
                for key, value in by_name.get(name, {}).items():
                    if key == COUNTER:
                        flat_state[key] = value.to(counter_device(partition.group, partition.flat), copy=True)
                        continue
                    if key not in flat_state:
                        flat_state[key] = torch.zeros_like(partition.flat, dtype=value.dtype, requires_grad=False)
                    partition.fill(flat_state[key], name, value)
            self.optimizer.state[partition.flat] = flat_state

    def compare(self, embedded: list[Tensor], progress: Progress) -> Loss:
        if self.zero_stage != 2:
            return super().compare(embedded, progress)
        with self._autocast():  # not by DeepSpeed, which would take part in its backward pass: see `backward_whole`
            return self.method.compare(embedded, progress)

    def backward_whole(self, value: Tensor, embedded: list[Tensor]) -> None:
        if self.zero_stage != 2:
            super().backward_whole(value, embedded)
            return
        # Stage 2 averages in each backward pass, and fails in one that gives no parameter a gradient.
        self._loss += value.detach()
        trained = [parameter for parameter in self.names if parameter.requires_grad]
        gradients = torch.autograd.grad(value, [*embedded, *trained], allow_unused=True)
        for leaf, gradient in zip(embedded, gradients, strict=False):
            leaf.grad = gradient
        pairs = zip(trained, gradients[len(embedded) :], strict=True)
        self._kept = [(parameter, gradient) for parameter, gradient in pairs if gradient is not None]

    def _backward(self, value: Tensor) -> None:
        if self._kept and self._micro_batches == self.accumulation:
            value = value + torch.stack([(parameter * gradient).sum() for parameter, gradient in self._kept]).sum()
            self._kept = []
        self.engine.set_gradient_accumulation_boundary(self._micro_batches == self.accumulation)
        try:
            self.engine.backward(value)
        except (AssertionError, AttributeError) as error:
            if self.zero_stage < 2 or not _is_in_reentrant_checkpoint(error):
                raise
            raise UsageError(
                f"engine.zero_stage = {self.zero_stage}: DeepSpeed cannot add up the gradients of a module that a step "
                "uses twice under reentrant activation checkpointing; checkpoint with use_reentrant=False, or take "
                "stage 0 or 1"
            ) from error

    def _gradients(self) -> dict[str, Tensor]:
        if self.zero_stage == 0:
            return super()._gradients()
        zero = self.engine.optimizer
        if self.zero_stage == 1:
            return self._average_parts()
        gradients: dict[str, Tensor] = {}
        if self.zero_stage == 2:  # a tensor for each parameter of the partition, and others that fill it up
            for i, partition in enumerate(self._partitions):
                parts = [part for part in zero.averaged_gradients[i] if not hasattr(part, "_zero_padding")]
                for (name, segment), part in zip(partition.own.items(), parts[: len(partition.own)], strict=True):
                    assert part.numel() == segment.length, f"{name}: another part of it than DeepSpeed's"
                    gradients[name] = part
            return gradients
        for i, parameters in enumerate(zero.fp16_groups):
            for parameter, gradient in zip(parameters, zero.averaged_gradients[i], strict=True):
                length = _part(parameter, distributed.rank())[1]
                if length:  # without what fills up the last rank's part
                    gradients[self.names[parameter]] = gradient.view(-1)[:length]
        return gradients

    def _leave_gradients(self) -> None:
        """Stage 1: keep DeepSpeed from averaging gradients, which `_average_parts` does.

        Its hooks and copies for each parameter cost networks of many small parameters more time on the host than the
        rest of ZeRO 1.
        """
        self.engine.enable_backward_allreduce = False
        for hook in self.engine.optimizer._grad_acc_hooks:
            hook.remove()

    @torch.no_grad()
    def _average_parts(self) -> dict[str, Tensor]:
        """Stage 1: average the gradients of each group as one flat tensor, of which each rank gets its part.

        Returns:
            For each parameter, what lies in this rank's part.
        """
        zero, gradients = self.engine.optimizer, dict[str, Tensor]()
        groups = zip(zero.round_robin_bit16_groups, zero.bit16_groups_flat, self._partitions, strict=True)
        for i, (parameters, whole, partition) in enumerate(groups):
            pieces = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
            rest = whole.new_zeros(whole.numel() - sum(piece.numel() for piece in pieces))
            flat = torch.cat([*pieces, rest])
            pieces.clear()
            for parameter in parameters:
                parameter.grad = None
            part = distributed.reduce_scatter_mean(flat)
            zero.averaged_gradients[i] = [part]
            gradients |= {name: part[s.offset : s.offset + s.length] for name, s in partition.own.items()}
        return gradients

    def _apply(self, is_applied: bool) -> None:
        self._is_applied = is_applied
        self.engine.step()
        if self.zero_stage == 3:  # else a parameter without gradient in the next step would see this one's
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()

    def _hold_back_steps(self) -> None:
        """Let the optimizer's step do nothing for a skipped step: DeepSpeed calls it group by group and tidies up after
        it, which has to happen in any case."""
        step = self.optimizer.step

        def guarded_step(*arguments: Any) -> Any:
            return step(*arguments) if self._is_applied else None

        self.optimizer.step = guarded_step  # type: ignore[assignment, method-assign]

    def _norm_share(self) -> float:
        return 1.0 / distributed.world_size() if self.zero_stage == 0 else 1.0

    def _shape(self, tensor: Tensor) -> torch.Size:
        return self._shapes[tensor] if isinstance(tensor, nn.Parameter) else tensor.shape

    def _whole(self, tensor: Tensor) -> Tensor:
        if self.zero_stage < 3 or not isinstance(tensor, nn.Parameter):
            return tensor.detach()
        with _library(self.device).zero.GatheredParameters([tensor]):
            return tensor.detach().clone()

    def _move(self, teachers: list[Any], students: list[Any], momentum: float) -> None:
        if self.zero_stage < 3:
            super()._move(teachers, students, momentum)
            return
        pairs = list(zip(teachers, students, strict=True))
        parts = [(t.ds_tensor, s.ds_tensor) for t, s in pairs if t.ds_status.name != "AVAILABLE"]
        whole = [(t, s) for t, s in pairs if t.ds_status.name == "AVAILABLE"]  # small ones, there beside the parts
        for moved in (parts, whole):
            ema_update_([teacher for teacher, _ in moved], [student for _, student in moved], momentum)
        for teacher, _ in whole:
            _fill_part(teacher, teacher)

    def _config(self, zero_options: Mapping[str, Any]) -> dict[str, Any]:
        numel = sum(parameter.numel() for group in self.optimizer.param_groups for parameter in group["params"])
        zero: dict[str, Any] = {"stage": self.zero_stage, "reduce_bucket_size": min(numel, LARGEST_BUCKET)}
        if self.zero_stage in (1, 2):
            zero["compute_grad_norm"] = False  # the guard did, without a host read
        return {
            "train_micro_batch_size_per_gpu": 1,  # a required number that nothing of ours depends on
            "gradient_accumulation_steps": 1,  # `backward` has divided
            "gradient_clipping": 0.0,  # the guard clips; left out, DeepSpeed clips at 1
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero | dict(zero_options),
            "timers": {"throughput": {"enabled": False}},  # it would wait for the device
        }

    def _read_partitions(self) -> list[Partition]:
        if self.zero_stage == 0:
            return []
        zero, groups, ranks = self.engine.optimizer, self.optimizer.param_groups, range(distributed.world_size())
        partitions = []
        flats, shared = (
            (zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups)
            if self.zero_stage < 3
            else (zero.fp32_partitioned_groups_flat, zero.fp16_groups)
        )
        for i, (flat, parameters) in enumerate(zip(flats, shared, strict=True)):
            if self.zero_stage < 3:
                group, size, starts = groups[i], zero.partition_size[i], zero.round_robin_bit16_offsets[i]
                segments = [self._cut(parameters, starts, rank * size, (rank + 1) * size) for rank in ranks]
            else:
                group = groups[zero.sub_group_to_group_id[i]]
                segments = [self._slices(parameters, rank) for rank in ranks]
            partitions.append(Partition(flat, group, [self.names[p] for p in parameters], segments))
        return partitions

    def _cut(self, parameters: list[nn.Parameter], starts: list[int], first: int, last: int) -> dict[str, Segment]:
        """Stages 1 and 2: parameters lie one after the other from `starts`; a rank has [first, last) of that."""
        segments = {}
        for parameter, start in zip(parameters, starts, strict=True):
            begin, end = max(start, first), min(start + parameter.numel(), last)
            if begin < end:
                segments[self.names[parameter]] = Segment(begin - start, begin - first, end - begin)
        return segments

    def _slices(self, parameters: list[Any], rank: int) -> dict[str, Segment]:
        """Stage 3: every rank has an equal slice of each parameter, filled up where the division leaves a rest."""
        segments, offset = {}, 0
        for parameter in parameters:
            start, length = _part(parameter, rank)
            if length:
                segments[self.names[parameter]] = Segment(start, offset, length)
            offset += parameter.partition_numel()
        return segments

    def _gather(self, partition: Partition, flat_state: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor on the CPU) of all parameters of a partition, from every rank's part of it."""
        parts = distributed.all_gather_rows(flat_state.detach().view(1, -1)).cpu()
        sizes = {name: self._shapes[self._by_name[name]].numel() for name in partition.names}
        wholes = {name: torch.zeros(size, dtype=flat_state.dtype) for name, size in sizes.items()}
        for part, segments in zip(parts, partition.segments, strict=True):
            for name, s in segments.items():
                wholes[name][s.start : s.start + s.length] = part[s.offset : s.offset + s.length]
        for name, whole in wholes.items():
            yield name, whole.view(self._shapes[self._by_name[name]])


class _WholeStep(nn.Module):
    """The method in the form that DeepSpeed wants: a module whose output is a tensor, or a list of tensors."""

    def __init__(self, method: Method, autocast: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self.method = method
        self.autocast = autocast

    def forward(self, compute: Callable[[], Any]) -> Any:
        """What `compute` returns.

        It calls functions of the method, not the method itself: stage 3 would hook into that, find no tensor in its
        output, and release the parameters that belong directly to it before backward. So they belong to this module.
        """
        with self.autocast():
            return compute()


def _initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, config: dict[str, Any]
) -> Any:
    deepspeed = _library(device)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # it can broadcast no other
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def _library(device: torch.device) -> Any:
    """DeepSpeed, which is quiet and starts no compiler."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it looks for others first, and says so
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # its calls, not ours
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise UsageError("several processes need DeepSpeed, which is not installed: pip install deepspeed") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Which of its own C++ operators it could compile here: none. The engine needs none. At the first question, every
    # rank would start compilers to find out, and on the CPU it would then compile one that only inference uses.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _is_in_reentrant_checkpoint(error: Exception) -> bool:
    """Whether an error was raised in the backward pass of `torch.utils.checkpoint` with `use_reentrant=True`."""
    code = CheckpointFunction.backward.__code__
    return any(frame.f_code is code for frame, _ in walk_tb(error.__traceback__))


def _part(parameter: Any, rank: int) -> tuple[int, int]:
    """(start, length) of `rank`'s part of a parameter under stage 3."""
    size = parameter.partition_numel()
    start = min(rank * size, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)


def _fill_part(parameter: Any, value: Tensor) -> None:
    """Set this rank's part of a parameter under stage 3 from the whole value."""
    start, length = _part(parameter, distributed.rank())
    parameter.ds_tensor.view(-1)[:length].copy_(value.flatten()[start : start + length])


def _own_lengths(partition: Partition) -> list[tuple[int, int]]:
    """(offset, length) for every parameter of the partition, (0, 0) for one of which this rank holds nothing."""
    nothing = Segment(0, 0, 0)
    own = (partition.own.get(name, nothing) for name in partition.names)
    return [(segment.offset, segment.length) for segment in own]
