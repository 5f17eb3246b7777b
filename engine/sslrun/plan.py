"""The plan of a run: the numbers of its loop, from a recipe and the hardware; and the text of `--dry-run`.

The recipe defines what is computed; the plan only divides each global batch among ranks and micro-batches. Each rank
has a contiguous block of the batch, and its micro-batches are contiguous pieces of that block.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslrun.data.loader import resolve_augment
from sslrun.data.split import fallbacks, paths
from sslrun.errors import UsageError
from sslrun.nn.norm import converted_norms, group_norms, plain_norms
from sslrun.recipe import Recipe
from sslrun.rehearsal import StepMemory, rehearse
from sslrun.runtime.compilation import why_no_cuda_graphs
from sslrun.runtime.run_files import MACHINE

logger = logging.getLogger("sslrun")

# Share of the free memory for what a step holds; the rest is for the loader's queue, the libraries and fragmentation.
MEMORY_SHARE = 0.8
MAX_BATCH = 2**24  # limits the cost of listing a batch's positions and possible micro-batches


@dataclass(frozen=True)
class Machine:
    """The settings chosen for a machine, which are recorded in the run folder and reused by a resume.

    Attributes:
        device: "cpu" or "cuda".
        precision: "fp32", "bf16" or "fp64".
        compile: whether networks are compiled.
        micro_batch: samples on a device at once.
        threads: threads of the CPU computation of one process.
        workers: threads of one process that read and decode images.
        memory: what a step is expected to hold on the device; counted anew at every start.
        tf32: whether float32 products use TensorFloat-32.
        cudnn_benchmark: whether cuDNN takes the algorithms that are fastest here.
        deterministic: whether only algorithms that repeat bit for bit are used.
        cuda_graphs: whether compiled networks are replayed as CUDA graphs.
    """

    device: str
    precision: str
    compile: bool
    micro_batch: int
    threads: int
    workers: int
    memory: StepMemory
    tf32: bool = False
    cudnn_benchmark: bool = False
    deterministic: bool = False
    cuda_graphs: bool = False


@dataclass(frozen=True)
class Plan:
    """The numbers of a training loop.

    Attributes:
        machine: the settings for this machine.
        world_size: number of ranks.
        accumulation: micro-batches per rank and optimizer step.
        steps_per_epoch: optimizer steps per epoch.
        total_steps: optimizer steps of the run.
        global_batch: samples per optimizer step over all ranks.
        num_samples: number of training samples, without those that are held out.
    """

    machine: Machine
    world_size: int
    accumulation: int
    steps_per_epoch: int
    total_steps: int
    global_batch: int
    num_samples: int

    def positions(self, step: int, rank: int) -> list[tuple[int, np.ndarray]]:
        """(epoch, positions in the epoch) of each micro-batch of `rank` at an optimizer step.

        With drop_last = false, the last positions may lie past the end of the epoch: they stand for its first samples,
        in other crops.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        per_rank = self.global_batch // self.world_size
        first = within * self.global_batch + rank * per_rank
        block = np.arange(first, first + per_rank, dtype=np.int64)
        return [(epoch, part) for part in np.split(block, self.accumulation)]


def device_of(recipe: Recipe, local_rank: int) -> torch.device:
    """The device of the process with this local rank. UsageError if the recipe asks for CUDA and there is none."""
    wanted = recipe.engine.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("engine.device is 'cuda', but torch sees no CUDA device; leave it at 'auto' to use the CPU")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def cores_of_a_rank(ranks_on_node: int) -> int:
    """Number of processor cores for one process."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_on_node)


def precision_of(recipe: Recipe, device: torch.device) -> str:
    """ "fp32", "bf16" or "fp64": the recipe's, or with "auto" bf16 on CUDA devices that support it, else fp32.

    Raises UsageError for fp64 on CUDA, whose kernels are not for it.
    """
    if recipe.engine.precision == "fp64" and device.type == "cuda":
        raise UsageError('engine.precision is "fp64", which is for the CPU: set engine.device = "cpu" too')
    if recipe.engine.precision != "auto":
        return recipe.engine.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def choose_machine(
    recipe: Recipe,
    device: torch.device,
    world_size: int,
    ranks_on_node: int,
    recorded: dict[str, Any] | None = None,
) -> Machine:
    """The recipe's settings, else those recorded in the run folder (`recorded`), else the best for this machine.

    A recorded setting that no start records is a warning and counts as absent.

    Raises:
        UsageError: the parts of the model do not fit together, or the global batch cannot be divided in this way.
    """
    engine, group = recipe.engine, recipe.data.samples_per_gpu
    possible = possible_micro_batches(recipe, world_size)
    per_rank = recipe.global_batch // world_size
    groups = per_rank // group
    before = _usable(recorded, possible)
    cores = cores_of_a_rank(ranks_on_node)
    cuda = device.type == "cuda"
    precision = before.get("precision") if engine.precision == "auto" else None
    precision = precision or precision_of(recipe, device)
    memory = rehearse(recipe, precision, torch.bfloat16 if cuda and precision == "bf16" else torch.float32)
    micro_batch = before.get("micro_batch") if engine.micro_batch == "auto" else engine.micro_batch
    if micro_batch is None:
        share = _free_bytes(device, ranks_on_node) * MEMORY_SHARE
        fitting = [size for size in possible if memory.total(groups, size // group) <= share]
        micro_batch = max(fitting, default=group)
    if micro_batch not in possible:
        raise UsageError(
            f"engine.micro_batch is {micro_batch}, but {per_rank} samples per process in groups of "
            f"data.samples_per_gpu {group} can be cut into: {', '.join(map(str, possible))}"
        )
    compile = engine.compile == "on" or (engine.compile == "auto" and cuda)
    tf32 = before.get("tf32") if precision == before.get("precision") else None
    return Machine(
        device=device.type,
        precision=precision,
        compile=compile,
        micro_batch=micro_batch,
        threads=engine.threads or before.get("threads") or cores,
        workers=min(recipe.data.workers_per_gpu, cores),
        memory=memory,
        tf32=cuda and _is_on(engine.tf32, precision == "bf16" if tf32 is None else tf32),
        cudnn_benchmark=cuda and _is_on(engine.cudnn_benchmark, not engine.deterministic),
        deterministic=engine.deterministic,
        cuda_graphs=_no_cuda_graphs(recipe, device.type, compile, world_size, per_rank // micro_batch) is None,
    )


def possible_micro_batches(recipe: Recipe, world_size: int) -> list[int]:
    """The micro-batches into which each rank can cut its share of the global batch, ascending.

    Raises:
        UsageError: the global batch cannot be divided among so many ranks.
    """
    group = recipe.data.samples_per_gpu
    _check_batch(recipe.global_batch, group, world_size)
    groups = recipe.global_batch // world_size // group
    return [group * n for n in range(1, groups + 1) if groups % n == 0]


def _usable(recorded: Any, micro_batches: list[int]) -> dict[str, Any]:
    """The settings in a record of machine.json that are of the right form."""
    if recorded is None:
        return {}
    values = recorded if isinstance(recorded, dict) else {}
    threads = values.get("threads")
    usable = {
        "precision": values.get("precision") in ("fp32", "bf16"),
        "micro_batch": type(values.get("micro_batch")) is int and values["micro_batch"] in micro_batches,
        "threads": type(threads) is int and threads > 0,
        "tf32": isinstance(values.get("tf32", False), bool),
    }
    if damaged := [name for name, is_usable in usable.items() if not is_usable]:
        logger.warning("%s records no usable %s: chosen anew", MACHINE, ", ".join(damaged))
    return {name: values[name] for name, is_usable in usable.items() if is_usable and name in values}


def make_plan(recipe: Recipe, num_samples: int, machine: Machine, world_size: int) -> Plan:
    """The plan. Raises UsageError if there are too few samples for one step or the schedule is shorter than the run."""
    batch = recipe.global_batch
    steps = steps_per_epoch(recipe, num_samples)
    if steps == 0:
        raise UsageError(
            f"the training source has {num_samples} samples, fewer than one global_batch of {batch}; "
            f"use a smaller global_batch, or data.drop_last = false"
        )
    total_steps = recipe.max_iters if recipe.max_iters is not None else (recipe.epochs or 0) * steps
    recipe.lr.check(steps, total_steps)
    return Plan(
        machine=machine,
        world_size=world_size,
        accumulation=batch // (world_size * machine.micro_batch),
        steps_per_epoch=steps,
        total_steps=total_steps,
        global_batch=batch,
        num_samples=num_samples,
    )


def steps_per_epoch(recipe: Recipe, num_samples: int) -> int:
    """Number of optimizer steps in an epoch of `num_samples` samples."""
    batch = recipe.global_batch
    return num_samples // batch if recipe.data.drop_last else -(-num_samples // batch)


def require_whole_sync_bn(recipe: Recipe, micro_batch: int, world_size: int) -> None:
    """Raises UsageError if SyncBN would see a part of the global batch without the recipe's consent.

    There is no exact form: every layer would wait for the statistics of all micro-batches, so that either all
    activations of the global batch are kept, or each layer takes one more pass through all layers before it.
    """
    at_once = micro_batch * world_size
    if at_once < recipe.global_batch and _has_sync_bn(recipe) and not recipe.engine.split_sync_bn:
        raise UsageError(
            f"SyncBN normalizes over the global batch, and {at_once} of its {recipe.global_batch} samples are on the "
            "devices at once: take more processes or a smaller global_batch; or the norm BN, with groups of "
            f"data.samples_per_gpu (now {recipe.data.samples_per_gpu}) on any machine; or engine.split_sync_bn = true, "
            "which normalizes over the samples that are there at once"
        )


def restricted_by_accumulation(recipe: Recipe, plan: Plan) -> str | None:
    """Batch statistics or losses that accumulation restricts to one micro-batch of all ranks; None if none."""
    norms = ["SyncBN's statistics"] * _has_sync_bn(recipe)
    is_exact = recipe.engine.gradient_cache and recipe.model.embeds
    losses = [f"the loss of {type(recipe.model).__name__}"] * (recipe.model.compares_samples and not is_exact)
    if plan.accumulation == 1 or not norms + losses:
        return None
    at_once = plan.global_batch // plan.accumulation
    return f"{' and '.join(norms + losses)}: of {at_once} samples at a time, not of all {plan.global_batch}"


def _has_sync_bn(recipe: Recipe) -> bool:
    """Whether a layer computes statistics over all ranks."""
    return any(layer.sync and layer.training for layer in group_norms(recipe.model))


def cuda_graphs_note(recipe: Recipe, plan: Plan) -> str | None:
    """Why a run that could be expected to use CUDA graphs does not; None if it does, or is without CUDA or asks for
    none."""
    machine, wanted = plan.machine, recipe.engine.cuda_graphs
    if wanted == "off" or (wanted == "auto" and machine.device != "cuda"):
        return None
    reason = _no_cuda_graphs(recipe, machine.device, machine.compile, plan.world_size, plan.accumulation)
    return None if reason is None else f"not used: {reason}"


def _no_cuda_graphs(recipe: Recipe, device: str, compile: bool, ranks: int, accumulation: int) -> str | None:
    engine = recipe.engine
    return why_no_cuda_graphs(
        engine.cuda_graphs,
        device=device,
        compile=compile,
        ranks=ranks,
        zero_stage=engine.zero_stage,
        accumulation=accumulation,
        deterministic=engine.deterministic,
    )


def norms_notes(recipe: Recipe) -> list[str]:
    """Lines on the BatchNorm layers of a user's network: which follow the recipe and which do not."""
    groups = "data.samples_per_gpu and skipped steps"
    followed, plain = converted_norms(recipe.model), plain_norms(recipe.model)
    notes = []
    if followed:
        notes.append(f"{len(followed)} BatchNorm layers of torch ({followed[0]}, ...) are converted to follow {groups}")
    if plain:
        notes.append(
            f"{len(plain)} BatchNorm layers do not follow {groups}, since their class has its own forward: "
            f"{plain[0]}, ..."
        )
    return notes


def describe(recipe: Recipe, plan: Plan, first_ids: list[int], data_note: str) -> str:
    """The text of `--dry-run`."""
    trained = sum(p.numel() for p in recipe.model.parameters() if p.requires_grad)
    followed = sum(p.numel() for p in recipe.model.parameters() if not p.requires_grad)
    machine = plan.machine
    views = " + ".join(f"{group.num_views} of {'x'.join(map(str, group.size))} px" for group in recipe.data.views)
    lines = [
        ("method", type(recipe.model).__name__),
        ("parameters", f"{trained / 1e6:.2f} M trained, {followed / 1e6:.2f} M in momentum encoders or frozen"),
        ("views", views),
        *augmentation_lines(recipe, torch.device(plan.machine.device)),
        ("samples", f"{plan.num_samples:,} ({data_note})"),
        (
            "global batch",
            f"{plan.global_batch} = {plan.world_size} rank(s) x {plan.accumulation} accumulated "
            f"x {machine.micro_batch} at once, BatchNorm groups of {recipe.data.samples_per_gpu}",
        ),
        *(("in parts", note) for note in [restricted_by_accumulation(recipe, plan)] if note is not None),
        *(("not started", note) for note in [_refusal(recipe, plan)] if note is not None),
        *(("BatchNorm", note) for note in norms_notes(recipe)),
        (
            "steps",
            f"{plan.total_steps:,} = {plan.total_steps / plan.steps_per_epoch:g} epochs x {plan.steps_per_epoch:,}",
        ),
        ("memory", _memory_line(recipe, plan)),
        *(("recomputed", ", ".join(parts)) for parts in [recipe.engine.checkpoint_activations] if parts),
        (
            "machine",
            f"{machine.device}, {machine.precision}, compile {'on' if machine.compile else 'off'}, "
            f"{machine.threads} threads{_cuda_settings(machine)}",
        ),
        *(("CUDA graphs", note) for note in [cuda_graphs_note(recipe, plan)] if note is not None),
        ("first ids", ", ".join(map(str, first_ids)) + ", ..."),
    ]
    return "\n".join(f"{name:<13}{text}" for name, text in lines)


def _refusal(recipe: Recipe, plan: Plan) -> str | None:
    """Why a run of this plan would not start; None if it would."""
    try:
        require_whole_sync_bn(recipe, plan.machine.micro_batch, plan.world_size)
    except UsageError as error:
        return str(error)
    return None


def _memory_line(recipe: Recipe, plan: Plan) -> str:
    """What one process holds at the fullest moment of a step, and of what it consists."""
    memory, group = plan.machine.memory, recipe.data.samples_per_gpu
    groups, at_once = plan.global_batch // plan.world_size // group, plan.machine.micro_batch // group
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "images": memory.images * groups,
        "activations": memory.activations * at_once,
    }
    listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    per_sample = memory.activations / group / 2**20
    return f"about {memory.total(groups, at_once) / 2**30:.2f} GiB: {listed} ({per_sample:.1f} MiB per sample)"


def _cuda_settings(machine: Machine) -> str:
    names = ("tf32", "cudnn_benchmark", "deterministic", "cuda_graphs") if machine.device == "cuda" else ()
    return "".join(f", {name} {'on' if getattr(machine, name) else 'off'}" for name in names)


def augmentation_lines(recipe: Recipe, device: torch.device) -> list[tuple[str, str]]:
    """A line for each view group: which of DALI, C, Triton and torch does each step, and which forms are missing."""
    augment = resolve_augment(recipe.data.augment)
    lines = []
    for place, group in enumerate(recipe.data.views):
        notes = "".join(f" ({reason})" for reason in fallbacks(group, augment, device))
        lines.append((f"views.{place}", f"{augment} mode; {paths(group, augment, device)}{notes}"))
    return lines


def _is_on(setting: str, auto: bool) -> bool:
    return auto if setting == "auto" else setting == "on"


def _free_bytes(device: torch.device, ranks_on_node: int) -> int:
    """Free memory for one process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_bytes_of_host() // ranks_on_node


def free_bytes_of_host() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 2**33


def _check_batch(batch: int, group: int, world_size: int) -> None:
    if not 1 <= batch <= MAX_BATCH or group < 1:
        raise UsageError(
            f"global_batch is {batch} and data.samples_per_gpu is {group}, expected both above 0, "
            f"and a batch of at most {MAX_BATCH:,}"
        )
    if batch % (group * world_size) == 0:
        return
    possible = [n for n in range(1, batch // group + 1) if batch % (group * n) == 0]
    if not possible:
        near = max(1, round(batch / group)) * group
        raise UsageError(
            f"global_batch {batch} is not a multiple of data.samples_per_gpu {group}; the nearest that is: {near}"
        )
    raise UsageError(
        f"global_batch {batch} in groups of data.samples_per_gpu {group} cannot be split among {world_size} processes; "
        f"possible numbers of processes: {', '.join(map(str, possible))}"
    )
