"""How long a recipe takes and what memory it needs, on GPUs that need not be here or on this CPU."""

from collections import Counter
from dataclasses import dataclass

import torch

from sslrun.capacity import communication, hardware, work
from sslrun.capacity.communication import Collectives, Sent
from sslrun.capacity.hardware import Gpu
from sslrun.capacity.work import Work
from sslrun.contract import Progress
from sslrun.errors import UsageError
from sslrun.plan import MEMORY_SHARE, free_bytes_of_host, possible_micro_batches, require_whole_sync_bn, steps_per_epoch
from sslrun.recipe import Recipe
from sslrun.rehearsal import StepMemory, rehearse

BUCKET = 4 * 50_000_000  # bytes of gradients that DeepSpeed averages at once
DAY_S = 86400


@dataclass(frozen=True)
class Cluster:
    """Where a run takes place.

    Attributes:
        gpu: what each rank has; None for this CPU.
        gpus: number of ranks.
        nodes: number of machines.
    """

    gpu: Gpu | None
    gpus: int
    nodes: int


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds at the fullest moment of a step.

    Attributes:
        weights: parameters and buffers, those gathered under stage 3, and the copies that autocast makes.
        gradients: of the trained parameters, with what DeepSpeed averages at once.
        optimizer: its state, and the copy of a rank's part of the parameters that DeepSpeed keeps.
        images: of a whole step.
        activations: of a micro-batch.
        available: of the device, as far as a step may fill it.
    """

    weights: float
    gradients: float
    optimizer: float
    images: float
    activations: float
    available: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.images + self.activations


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to need.

    Attributes:
        global_batch: samples per optimizer step.
        micro_batch: samples on a device at once.
        accumulation: micro-batches per rank and optimizer step.
        total_steps: optimizer steps of the run.
        num_samples: samples of an epoch.
        epochs: length of the run.
        memory: of each rank.
        flops: of convolutions and matrix products per rank and step.
        bytes: read and written per rank and step.
        forward_s, backward_s: of all micro-batches of a step.
        update_s: optimizer, check of the gradients, momentum encoders.
        by_bound: share of the computing time that is bound by "products", "memory" and "launches"; empty on the CPU.
        sent: by purpose, what a rank sends per step; a step waits for it.
        loader_images_per_s: images per second that the loaders of all ranks deliver at most; None if they decode none.
        stages: by ZeRO stage, (bytes of memory, seconds of communication per step) with the same micro-batch.
    """

    global_batch: int
    micro_batch: int
    accumulation: int
    total_steps: int
    num_samples: int
    epochs: float
    memory: Memory
    flops: float
    bytes: float
    forward_s: float
    backward_s: float
    update_s: float
    by_bound: dict[str, float]
    sent: dict[str, Sent]
    loader_images_per_s: float | None
    stages: dict[int, tuple[float, float]]

    @property
    def compute_s(self) -> float:
        return self.forward_s + self.backward_s + self.update_s

    @property
    def communication_s(self) -> float:
        return sum(each.seconds for each in self.sent.values())

    @property
    def loader_s(self) -> float:
        """Seconds in which the loaders deliver the images of a step."""
        return self.global_batch / self.loader_images_per_s if self.loader_images_per_s else 0.0

    @property
    def step_s(self) -> float:
        """A step computes, then communicates; the loaders work at the same time."""
        return max(self.compute_s + self.communication_s, self.loader_s)

    @property
    def images_per_s(self) -> float:
        return self.global_batch / self.step_s

    @property
    def days(self) -> float:
        return self.total_steps * self.step_s / DAY_S


def estimate(recipe: Recipe, num_samples: int, cluster: Cluster) -> Estimate:
    """What a recipe needs on a cluster.

    Args:
        recipe: built; its weights may have no memory.
        num_samples: number of training samples.
        cluster: where it runs.

    Raises:
        UsageError: there are fewer samples than a batch, the batch cannot be divided among the ranks, the memory never
            suffices, SyncBN would see a part of the batch, or the parts of the model do not fit together.
    """
    gpu, ranks, group = cluster.gpu, cluster.gpus, recipe.data.samples_per_gpu
    possible = possible_micro_batches(recipe, ranks)
    steps = steps_per_epoch(recipe, num_samples)
    if steps == 0:
        raise UsageError(f"{num_samples:,} images are fewer than one global_batch of {recipe.global_batch:,}")
    precision = recipe.engine.precision
    if precision == "auto":
        precision = "fp32" if gpu is None else "bf16"
    images = torch.bfloat16 if gpu is not None and precision == "bf16" else torch.float32
    rehearsed = rehearse(recipe, precision, images)
    per_rank = recipe.global_batch // ranks
    micro_batch, memory = _fitting(recipe, rehearsed, possible, per_rank, cluster)
    require_whole_sync_bn(recipe, micro_batch, ranks)
    groups, accumulation = micro_batch // group, per_rank // micro_batch
    counted = work.count(recipe, precision, images, groups)
    of_method = communication.of_method(recipe, precision, images, groups, ranks)
    of_method = Counter({collective: accumulation * n for collective, n in of_method.items()})
    trained, followed = _parameter_bytes(recipe)
    model = recipe.model
    embeds_twice = recipe.engine.gradient_cache and accumulation > 1 and model.compares_samples and model.embeds
    forwards = accumulation * (2 if embeds_twice else 1)
    times = {work.FORWARD: forwards, work.BACKWARD: accumulation, work.UPDATE: 1}
    step = Counter({operation: times[operation.phase] * n for operation, n in counted.items()})
    shards = ranks if recipe.engine.zero_stage > 0 else 1
    seconds = _seconds(step, cluster, recipe.engine.threads)
    moved = _moved_by_update(recipe, trained, accumulation, ranks)
    total_steps = recipe.max_iters if recipe.max_iters is not None else (recipe.epochs or 0) * steps
    stages = {}
    for stage in range(4):
        of_zero = communication.of_zero(stage, trained, followed, accumulation)
        held = memory_of_rank(recipe, rehearsed, micro_batch, per_rank, stage, ranks, memory.available)
        stages[stage] = held.total, _sent(of_zero + of_method, cluster).seconds
    of_zero = communication.of_zero(recipe.engine.zero_stage, trained, followed, accumulation)
    by_purpose: dict[str, Collectives] = {}
    for collective, n in (of_zero + of_method).items():
        by_purpose.setdefault(collective.purpose, Counter())[collective] = n
    return Estimate(
        global_batch=recipe.global_batch,
        micro_batch=micro_batch,
        accumulation=accumulation,
        total_steps=total_steps,
        num_samples=num_samples,
        epochs=total_steps / steps,
        memory=memory,
        flops=sum(operation.flops * n for operation, n in step.items()),
        bytes=sum(operation.bytes * n for operation, n in step.items()) + moved,
        forward_s=seconds[work.FORWARD],
        backward_s=seconds[work.BACKWARD],
        update_s=seconds[work.UPDATE] / shards + _seconds_of_bytes(moved, cluster),
        by_bound=_bounds(step, gpu) if gpu is not None else {},
        sent={name: _sent(found, cluster) for name, found in by_purpose.items()} if ranks > 1 else {},
        loader_images_per_s=_loader_rate(recipe, cluster),
        stages=stages if ranks > 1 else {},
    )


def memory_of_rank(
    recipe: Recipe, rehearsed: StepMemory, micro_batch: int, per_rank: int, stage: int, ranks: int, available: float
) -> Memory:
    """What a rank holds under a ZeRO stage.

    Stage 1 shards the optimizer's state, stage 2 the gradients too, stage 3 the parameters too, of which it gathers up
    to 10^9 at once. Stages 1 to 3 keep a copy of the rank's part of the trained parameters, which is the master copy.

    Args:
        recipe: the recipe.
        rehearsed: the memory of one BatchNorm group, unsharded.
        micro_batch: samples at once.
        per_rank: samples of a rank in a step.
        stage: ZeRO stage; without effect on a single rank.
        ranks: number of ranks.
        available: bytes that a step may fill.
    """
    group = recipe.data.samples_per_gpu
    trained, followed = _parameter_bytes(recipe)
    weights, gradients, optimizer = map(float, (rehearsed.weights, rehearsed.gradients, rehearsed.optimizer))
    if ranks > 1:
        bucket = min(trained, BUCKET)
        if stage == 3:
            parts = (trained + followed) / ranks
            gathered = min(trained + followed, 4 * communication.GATHERED_AT_MOST)
            weights = weights - (trained + followed) + parts + gathered
        gradients = (gradients if stage < 2 else gradients / ranks) + (gradients / ranks if stage == 1 else 0) + bucket
        if stage > 0:
            optimizer = optimizer / ranks + trained / ranks
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        images=rehearsed.images * per_rank / group,
        activations=rehearsed.activations * micro_batch / group,
        available=available,
    )


def _fitting(
    recipe: Recipe, rehearsed: StepMemory, possible: list[int], per_rank: int, cluster: Cluster
) -> tuple[int, Memory]:
    """The recipe's micro-batch, else the largest that fits, and its memory. UsageError if none fits."""
    total = free_bytes_of_host() if cluster.gpu is None else cluster.gpu.memory_gib * 2**30
    available = total * MEMORY_SHARE

    def needed(size: int, stage: int) -> Memory:
        return memory_of_rank(recipe, rehearsed, size, per_rank, stage, cluster.gpus, available)

    stage, wanted = recipe.engine.zero_stage, recipe.engine.micro_batch
    if wanted != "auto" and wanted not in possible:
        raise UsageError(
            f"engine.micro_batch is {wanted}, but {per_rank} samples per process can be cut into: "
            f"{', '.join(map(str, possible))}"
        )
    sizes = possible if wanted == "auto" else [wanted]
    fitting = [size for size in sizes if needed(size, stage).total <= available]
    if fitting:
        return fitting[-1], needed(fitting[-1], stage)
    least = needed(sizes[0], stage)
    stages = [s for s in range(stage + 1, 4) if cluster.gpus > 1 and needed(sizes[0], s).total <= available]
    smaller = [size for size in possible if size < sizes[0] and needed(size, stage).total <= available]
    free = available - (least.total - least.activations)
    at_once = int(free / least.activations * sizes[0])
    if smaller:
        help = f"engine.micro_batch = {smaller[-1]} would fit"
    elif stages:
        help = f"engine.zero_stage = {stages[0]} would fit"
    elif at_once > 0:
        help = (
            f"{at_once} samples at once would fit: engine.checkpoint_activations keeps less of each, and a "
            "smaller data.samples_per_gpu changes the BatchNorm groups"
        )
    else:
        help = "not even the weights do: take more GPUs with engine.zero_stage = 3, or larger ones"
    raise UsageError(
        f"a micro-batch of {sizes[0]} needs {least.total / 2**30:.1f} GiB per GPU, and a step may fill "
        f"{available / 2**30:.1f}; {help}"
    )


def _parameter_bytes(recipe: Recipe) -> tuple[int, int]:
    """Bytes of parameters that are trained, and that are not."""
    sizes = {True: 0, False: 0}
    for parameter in recipe.model.parameters():
        sizes[parameter.requires_grad] += parameter.numel() * parameter.element_size()
    return sizes[True], sizes[False]


def _moved_by_update(recipe: Recipe, trained: int, accumulation: int, ranks: int) -> float:
    """Bytes moved in a step beside the counted operations: gradients are added up and checked, teachers are moved."""
    pairs = recipe.model.teachers(Progress(step=0, total_steps=1, steps_per_epoch=1, seed=0))
    followed = sum(p.numel() * p.element_size() for teacher, _, _ in pairs for p in teacher.parameters())
    stage = recipe.engine.zero_stage if ranks > 1 else 0
    added, checked = 3 * (accumulation - 1) * trained, trained / (ranks if stage >= 2 else 1)
    return added + checked + 3 * followed / (ranks if stage == 3 else 1)


def _seconds(step: Work, cluster: Cluster, threads: int) -> dict[str, float]:
    """Expected seconds of each phase of a step."""
    phases = (work.FORWARD, work.BACKWARD, work.UPDATE)
    if cluster.gpu is not None:
        return {phase: cluster.gpu.seconds(work.of_phase(step, phase)) for phase in phases}
    timed = hardware.seconds_here(step, threads or hardware.cores())
    return {phase: sum(timed[each] * n for each, n in work.of_phase(step, phase).items()) for phase in phases}


def _seconds_of_bytes(moved: float, cluster: Cluster) -> float:
    rate = hardware.copy_rate_here() if cluster.gpu is None else cluster.gpu.bandwidth * hardware.SHARE
    return moved / rate


def _bounds(step: Work, gpu: Gpu) -> dict[str, float]:
    """Share of the least time in operations that are bound by each of three rates."""
    names = ("products", "memory", "launches")
    seconds = dict.fromkeys(names, 0.0)
    for operation, times in step.items():
        parts = gpu.parts(operation)
        seconds[names[parts.index(max(parts))]] += times * max(parts)
    return {name: seconds[name] / sum(seconds.values()) for name in names}


def _sent(collectives: Collectives, cluster: Cluster) -> Sent:
    if cluster.gpu is None:  # a run of one process
        return Sent(0.0, 0.0, 0.0)
    return communication.sent(collectives, cluster.gpu, cluster.gpus, cluster.nodes)


def _loader_rate(recipe: Recipe, cluster: Cluster) -> float | None:
    if recipe.data.source.is_decoded:
        return None
    if cluster.gpu is not None:
        return cluster.gpu.decoded * cluster.gpus
    return hardware.cores() / hardware.CORE_S_PER_IMAGE
