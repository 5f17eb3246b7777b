"""Ranks, and the few collectives that the engine and the methods need.

A launcher (`deepspeed`, `torchrun`, `srun`) gives each process its rank in the environment. A run of one process
initializes nothing, and every function works without communication. All ranks call a collective with equal shapes.
A rank that is missing is named, and the others leave (`heartbeat.py`).
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor

from sslrun.errors import RunFailed, UsageError
from sslrun.runtime import heartbeat
from sslrun.runtime.late_value import LateValue
from sslrun.runtime.launch_checks import environment_fault, slurm_note, slurm_tasks
from sslrun.runtime.network import interface_for
from sslrun.runtime.rendezvous import PATIENCE, from_environment, meet
from sslrun.runtime.signals import Stopped

T = TypeVar("T")

# The names before torch 2.13 are longer.
gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
scatter_sum_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_is_alone = False

TIMEOUT_S = 600.0


def rank() -> int:
    """Number of this process among all, from 0."""
    return 0 if _is_alone else _from_launcher("RANK", "SLURM_PROCID", 0)


def local_rank() -> int:
    """Number of this process among those of its machine, from 0: the index of its GPU."""
    return _from_launcher("LOCAL_RANK", "SLURM_LOCALID", 0)


def world_size() -> int:
    """Number of processes of the run."""
    return 1 if _is_alone else _from_launcher("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)


@contextmanager
def alone() -> Iterator[None]:
    """A context in which this process counts as a run of one, for what one rank computes without the others."""
    global _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = False


def is_alone() -> bool:
    """Whether this process is in `alone`."""
    return _is_alone


def group() -> dist.ProcessGroup | None:
    """The group of all ranks, for the functions of sslkernels; None in a run of one process."""
    return dist.group.WORLD if world_size() > 1 else None


def ranks_on_node() -> int:
    """Number of processes of the run on this machine."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun; deepspeed
        if name in os.environ and "WORLD_SIZE" in os.environ:
            return int(os.environ[name])
    if _is_slurm_step():
        counts = _expand_counts(os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        return counts[min(int(os.environ.get("SLURM_NODEID", "0")), len(counts) - 1)]
    return world_size()


def nodes() -> int:
    """Number of machines that have a rank. All ranks call it."""
    return gather_objects(local_rank()).count(0)


def init(device: torch.device, timeout_s: float = TIMEOUT_S) -> None:
    """Join the other processes, by NCCL on a CUDA device and by gloo on the CPU; does nothing in a run of one.

    From now on each rank watches over the others. If one is missing, this process ends with exit code 1.

    Args:
        device: device of this rank.
        timeout_s: how long to wait for the others to start, and later for a rank that makes no progress.

    Raises:
        UsageError: the ranks were not started as one run, or there are fewer GPUs than ranks here.
    """
    if (fault := environment_fault(os.environ)) is not None:
        raise UsageError(fault)
    if world_size() == 1:
        if (note := slurm_note(os.environ)) is not None:
            print(f"note: {note}", file=sys.stderr)
        return
    if device.type == "cuda" and ranks_on_node() > (gpus := torch.cuda.device_count()):
        raise UsageError(
            f"{ranks_on_node()} ranks are started on this machine, but torch sees {gpus} GPU{'s' * (gpus != 1)}: each "
            'needs its own (or set engine.device = "cpu")'
        )
    if _is_slurm_step():
        _export_slurm()
    meeting = meet(rank(), world_size(), timeout_s)
    heartbeat.join(meeting.heartbeat)
    joining: dict[str, Any] = {"store": meeting.store, "rank": rank(), "world_size": world_size()}
    if device.type == "cuda":
        # NCCL's own watch would end the process, with a dump, before it is known which rank is missing.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # torchrun sets it to 1
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(2 * timeout_s)))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=PATIENCE, device_id=device, **joining)
    else:
        interface = interface_for(meeting.arrivals[0].address, [arrival.address for arrival in meeting.arrivals])
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        dist.init_process_group("gloo", timeout=PATIENCE, **joining)


def leave(kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
    """Leave the other processes, as the last exit of a run: the others hear with which error, if there is one."""
    heartbeat.leave(error)
    if world_size() > 1 and dist.is_initialized():
        dist.destroy_process_group()


def shutdown() -> None:
    """Leave the other processes in order; the last call of a run."""
    leave(None, None, None)


def broadcast_object(value: T) -> T:
    """Rank 0's `value`, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    heartbeat.enter_collective()
    dist.broadcast_object_list(box, src=0, device=_collective_device())
    return box[0]


def from_rank_0(work: Callable[[], T]) -> T:
    """The result of `work` on rank 0, on every rank; an error of the user's that rank 0 finds is raised on every rank.

    Raises:
        UsageError, RunFailed, Stopped: as `work` did on rank 0.
    """
    value: Any = None
    error: BaseException | None = None
    if rank() == 0:
        try:
            with heartbeat.unhurried():
                value = work()
        except (UsageError, RunFailed, Stopped) as problem:
            error = problem
    value, error = broadcast_object((value, error))
    if error is not None:
        if isinstance(error, (UsageError, RunFailed)):
            error.is_common = True
        raise error
    return value


def gather_objects(value: T) -> list[T]:
    """Every rank's `value`, in rank order, on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        heartbeat.enter_collective()
        dist.all_gather_object(values, value)
    return values


class Vote:
    """A vote of all ranks on whether to stop, so that none waits in a collective for one that has left.

    Args:
        device: device of the run. On CUDA the result is read one step late, so that the host does not wait.

    Attributes:
        is_late: whether the result is read one step late.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: LateValue | None = None
        self.is_late = device.type == "cuda" and world_size() > 1

    def cast(self, value: int) -> int:
        """The largest value of all ranks: of this call, or on CUDA of the call before."""
        if world_size() == 1:
            return value
        vote = torch.full((), value, dtype=torch.int32, device=self._device)  # `torch.tensor` would wait for the device
        heartbeat.enter_collective()
        dist.all_reduce(vote, dist.ReduceOp.MAX)
        if not self.is_late:
            return int(vote)
        earlier, self._pending = self._pending, LateValue(vote)
        return 0 if earlier is None else int(earlier.read())


def largest(value: int) -> int:
    """The largest value of all ranks, at once. (`Vote` does not let the host wait on CUDA.)"""
    if world_size() == 1:
        return value
    box = torch.tensor(value, dtype=torch.int32, device=_collective_device())
    heartbeat.enter_collective()
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Copy rank 0's values into the tensors of every rank, bit by bit: gloo and NCCL do not know every dtype."""
    if world_size() > 1:
        for tensor in tensors:
            source = tensor.detach().contiguous()
            dist.broadcast(source.reshape(-1).view(torch.uint8), src=0)
            tensor.detach().copy_(source)


def all_reduce_sum_(x: Tensor) -> Tensor:
    """The sum over ranks, in place and returned."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


@torch.no_grad()
def all_reduce_mean_(tensors: list[Tensor]) -> None:
    """The mean over ranks of each tensor, in place, as one collective."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))


@torch.no_grad()
def reduce_scatter_mean(x: Tensor) -> Tensor:
    """(ranks x n,) -> (n,): this rank's part of the mean over ranks. `x` does not keep its values."""
    x /= world_size()
    part = x.new_empty(len(x) // world_size())
    scatter_sum_into(part, x)
    return part


@torch.no_grad()
def all_gather_rows(x: Tensor) -> Tensor:
    """(B, ...) of each rank -> (ranks x B, ...) in rank order, without gradient. A channels-last layout is kept."""
    if world_size() == 1:
        return x.detach()
    rows, channels_last = _row_major(x.detach())
    gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    gather_into(gathered, rows)
    return gathered.permute(0, 3, 1, 2) if channels_last else gathered


def share(num_rows: int) -> slice:
    """The rows of this rank if `num_rows` rows are dealt out evenly."""
    return slice(*_share(num_rows, rank(), world_size()))


def total_rows(mine: Tensor, device: torch.device) -> int:
    """Number of rows of all ranks, of which each passes its `share`; `device` is that of the run."""
    total = int(all_reduce_sum_(torch.tensor(len(mine), device=device)))
    here = share(total)
    assert len(mine) == here.stop - here.start, "not this rank's share of the rows"
    return total


@torch.no_grad()
def all_gather_shares(x: Tensor, num_rows: int) -> Tensor:
    """Each rank's `share` of the rows, (n, ...) -> all rows, (num_rows, ...), without gradient."""
    ranks = world_size()
    if ranks == 1:
        return x.detach()
    padded = x.new_zeros((-(-num_rows // ranks), *x.shape[1:]))
    padded[: len(x)] = x
    parts = all_gather_rows(padded).split(len(padded))
    shares = (_share(num_rows, r, ranks) for r in range(ranks))
    return torch.cat([part[: last - first] for part, (first, last) in zip(parts, shares, strict=True)])


def all_gather_rows_with_gradient(x: Tensor) -> Tensor:
    """As `all_gather_rows`; backward gives each rank the sum, over all ranks, of the gradients of its own rows.

    For a loss that is averaged over ranks, as the executor averages gradients, this is the exact gradient.
    """
    return x if world_size() == 1 else _GatherRows.apply(x)


def all_reduce_mean_with_gradient(x: Tensor) -> Tensor:
    """The mean over ranks; backward gives each rank the mean, over all ranks, of the gradients with respect to it.

    For a loss that is averaged over ranks, as the executor averages gradients, this is the exact gradient.
    """
    return x if world_size() == 1 else _RankMean.apply(x)


@torch.no_grad()
def exchange_rows(x: Tensor, permutation: Tensor) -> Tensor:
    """Row p of the global batch becomes row `permutation[p]` of the concatenation over ranks.

    Each rank receives only its own contiguous block of the result. Without gradient; a channels-last layout
    is kept.

    Args:
        x: (B, ...), this rank's rows.
        permutation: (ranks x B,), int64, equal on all ranks; preferably on the CPU, where it is read.
    """
    if world_size() == 1:
        return x.detach()[permutation.to(x.device, non_blocking=True)]  # unlike index_select it keeps the layout
    rows, channels_last = _row_major(x.detach())
    block = rows.shape[0]
    source_of = permutation.cpu().view(world_size(), block)  # [d, i]: which global row becomes row i of rank d
    mine = source_of // block == rank()
    send = source_of[mine] % block  # in order of destination, then of place there
    owner = source_of[rank()] // block
    place = owner.argsort(stable=True)  # what comes in is in order of source, then of place here
    received = torch.empty_like(rows)
    dist.all_to_all_single(
        received,
        rows.index_select(0, send.to(x.device, non_blocking=True)),
        output_split_sizes=owner.bincount(minlength=world_size()).tolist(),
        input_split_sizes=mine.sum(1).tolist(),
    )
    result = torch.empty_like(received).index_copy_(0, place.to(x.device, non_blocking=True), received)
    return result.permute(0, 3, 1, 2) if channels_last else result


def _share(num_rows: int, rank: int, ranks: int) -> tuple[int, int]:
    return num_rows * rank // ranks, num_rows * (rank + 1) // ranks


def rank_sum(x: Tensor) -> Tensor:
    """The sum over ranks, without gradient, by a functional collective, which a compiled graph may contain."""
    return functional_collectives.all_reduce(x.contiguous(), "sum", _everyone())


def ranks_stacked(x: Tensor) -> Tensor:
    """(n,) of each rank -> (ranks, n), without gradient, by a functional collective, as `rank_sum`."""
    renamed = getattr(functional_collectives, "all_gather_single", None)  # since torch 2.13
    gather = renamed or functional_collectives.all_gather_tensor
    return gather(x.contiguous(), 0, _everyone()).view(world_size(), -1)


def _everyone() -> dist.ProcessGroup:
    everyone = group()
    assert everyone is not None, "a run of one process has no collectives"
    return everyone


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return all_gather_rows(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = all_reduce_sum_(gradients[0].contiguous().clone())
        return total[rank() * ctx.rows : (rank() + 1) * ctx.rows]


class _RankMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return rank_sum(x) / world_size()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return rank_sum(gradients[0]) / world_size()


def _row_major(x: Tensor) -> tuple[Tensor, bool]:
    """(x with each row in one piece of memory, whether that took a permutation to channels-last)."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1), True
    return x.contiguous(), False


def _collective_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _from_launcher(name: str, slurm_name: str, alone: int) -> int:
    if "WORLD_SIZE" in os.environ:
        return from_environment(name) if name in os.environ else alone
    return from_environment(slurm_name) if _is_slurm_step() else alone


def _is_slurm_step() -> bool:
    """Started by srun with several tasks, and by no other launcher. (A batch script alone is one process.)"""
    return "WORLD_SIZE" not in os.environ and slurm_tasks(os.environ) > 1


def _export_slurm() -> None:
    """Set torchrun's environment variables from Slurm's, for libraries that know only those."""
    nodes, job, step = (os.environ.get(f"SLURM_{key}", "0") for key in ("STEP_NODELIST", "JOB_ID", "STEP_ID"))
    os.environ.setdefault("MASTER_ADDR", _first_host(nodes))
    os.environ.setdefault("MASTER_PORT", str(20000 + (int(job) * 7 + int(step)) % 20000))
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    values = (rank(), local_rank(), ranks_on_node(), world_size())
    os.environ.update({name: str(value) for name, value in zip(names, values, strict=True)})


def _first_host(nodes: str) -> str:
    """The first host of a Slurm list: `gpu[03-05,9],login` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[([^],-]+)[^]]*\]([^,]*))?", nodes)
    assert match is not None, f"not a list of hosts: {nodes!r}"
    return "".join(part or "" for part in match.groups())


def _expand_counts(text: str) -> list[int]:
    """Slurm's tasks per node: `4(x2),3` -> [4, 4, 3]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts
