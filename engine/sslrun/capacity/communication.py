"""What ranks send: the collectives of a method, counted in played ranks, and those of DeepSpeed; and their time."""

import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sslrun.capacity.hardware import LATENCY_S, LINK_SHARE, Gpu
from sslrun.recipe import Recipe
from sslrun.rehearsal import rehearse

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL = "all-reduce", "all-gather", "reduce-scatter", "all-to-all"
KINDS = {"allreduce": ALL_REDUCE, "all_reduce": ALL_REDUCE, "allgather": ALL_GATHER, "all_gather": ALL_GATHER}
KINDS |= {"alltoall": ALL_TO_ALL, "all_to_all": ALL_TO_ALL, "reduce_scatter": REDUCE_SCATTER}
GRADIENTS, PARAMETERS, METHOD = "gradients", "parameters", "the method and batch statistics"
GATHERED_AT_MOST = 1_000_000_000  # parameters that stage 3 keeps whole at once, DeepSpeed's max_live_parameters


@dataclass(frozen=True)
class Collective:
    """A call that all ranks take part in.

    Attributes:
        kind: ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER or ALL_TO_ALL.
        bytes: of its largest tensor on one rank: what is reduced, the gathered whole, what is exchanged.
        purpose: GRADIENTS, PARAMETERS or METHOD.
    """

    kind: str
    bytes: int
    purpose: str


Collectives = Counter[Collective]


@dataclass(frozen=True)
class Sent:
    """What one rank sends in some collectives.

    Attributes:
        link: bytes to other GPUs of the node.
        network: bytes to other nodes.
        seconds: time of all of them, one after the other.
    """

    link: float
    network: float
    seconds: float


def sent(collectives: Collectives, gpu: Gpu, gpus: int, nodes: int) -> Sent:
    """Bytes and time of collectives, in rings within a node and, each GPU with a share, rings between nodes.

    With n GPUs in each of N nodes, an all-gather of S bytes sends (n - 1) / n S over the links of a node and
    (N - 1) / N S / n over each GPU's network; a reduce-scatter as much; an all-reduce is both (Thakur et al. 2005,
    "Optimization of Collective Communication Operations in MPICH"). An all-to-all sends each of the ranks its part.

    Args:
        collectives: with the number of their calls.
        gpu: one of the ranks.
        gpus: number of ranks.
        nodes: number of nodes.
    """
    per_node = gpus // nodes
    link = network = latency = 0.0
    for collective, times in collectives.items():
        size, rounds = times * collective.bytes, 2 if collective.kind == ALL_REDUCE else 1
        if collective.kind == ALL_TO_ALL:
            link += size * (per_node - 1) / gpus
            network += size * (gpus - per_node) / gpus
        else:
            link += rounds * size * (per_node - 1) / per_node
            network += rounds * size / per_node * (nodes - 1) / nodes
        latency += times * LATENCY_S * (1 + math.log2(nodes))
    seconds = (link / gpu.link + network / gpu.network) / LINK_SHARE + (latency if gpus > 1 else 0.0)
    return Sent(link, network, seconds)


def of_zero(stage: int, trained: int, followed: int, accumulation: int) -> Collectives:
    """The collectives by which DeepSpeed averages gradients and gathers parameters in one optimizer step.

    Stages 0 and 1 average once per step. Stages 1 and 2 average by all-reduce (`use_multi_rank_bucket_allreduce`),
    of which each rank keeps its part, and gather the updated parameters.

    Args:
        stage: ZeRO stage, 0 to 3.
        trained: bytes of the trained parameters, which is also that of their gradients.
        followed: bytes of parameters without gradient.
        accumulation: micro-batches in a step.
    """
    if stage == 3:
        passes = accumulation * (1 if trained + followed <= 4 * GATHERED_AT_MOST else 2)
        return Counter(
            {
                Collective(REDUCE_SCATTER, trained, GRADIENTS): accumulation,
                Collective(ALL_GATHER, trained + followed, PARAMETERS): passes,
            }
        )
    found = Counter({Collective(ALL_REDUCE, trained, GRADIENTS): accumulation if stage == 2 else 1})
    if stage > 0:
        found[Collective(ALL_GATHER, trained, PARAMETERS)] += 1
    return found


def of_method(recipe: Recipe, precision: str, images: torch.dtype, groups: int, ranks: int) -> Collectives:
    """The collectives of a method's forward and backward pass of one micro-batch, which this process plays with others.

    Args:
        recipe: a recipe.
        precision: "fp32" or "bf16".
        images: dtype of the views that the loader delivers.
        groups: number of BatchNorm groups of the micro-batch of one rank.
        ranks: number of ranks.
    """
    if ranks == 1:
        return Counter()
    watch = _Listen(groups * recipe.data.samples_per_gpu, ranks)
    with _played(ranks):
        rehearse(recipe, precision, images, groups, watch, is_alone=False)
    return watch.heard


@contextmanager
def _played(ranks: int) -> Iterator[None]:
    """This process counts as rank 0 of several; collectives have results of the right shape."""
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict(zip(names, (str(ranks), str(ranks), "0", "0"), strict=True)))
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class _Listen(TorchDispatchMode):
    """Counts collectives on fake tensors.

    Args:
        samples: of the micro-batch.
        ranks: number of ranks. Where the host draws which rows go to which rank, each rank gets an equal share.
    """

    def __init__(self, samples: int, ranks: int) -> None:
        super().__init__()
        self.heard: Collectives = Counter()
        self._samples, self._ranks = samples, ranks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten: Any = torch.ops.aten
        if func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            return args[0].new_empty(self._samples)
        if func is aten.bincount.default:
            return args[0].new_empty(self._ranks)
        if func is aten._local_scalar_dense.default:
            return self._samples // self._ranks
        name = func.name().split("::")[1].strip("_")
        kind = next((kind for start, kind in KINDS.items() if name.startswith(start)), None)
        if func.namespace in ("c10d", "_c10d_functional") and kind is not None:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            size = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            if kind == ALL_GATHER and func.namespace == "_c10d_functional":  # its result is not among the arguments
                size *= self._ranks
            self.heard[Collective(kind, size, METHOD)] += 1
        return func(*args, **(kwargs or {}))
