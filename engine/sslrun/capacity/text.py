"""An estimate as text and as JSON: the answer, a table, what limits, and what would help."""

from dataclasses import asdict
from typing import Any

from sslrun.capacity import hardware
from sslrun.capacity.communication import METHOD
from sslrun.capacity.estimation import Cluster, Estimate
from sslrun.number_format import counted, duration, number
from sslrun.plan import MEMORY_SHARE
from sslrun.recipe import Recipe

MUCH = 0.2  # share of a step that is worth a sentence
FEW_SAMPLES = 64  # on a GPU at once, which leave it waiting for launches


def as_text(name: str, recipe: Recipe, cluster: Cluster, found: Estimate) -> str:
    """The text of `sslrun plan`."""
    ranks, gpu = cluster.gpus, cluster.gpu
    device = "this CPU" if gpu is None else f"{ranks} x {gpu.name.upper()}"
    memory = found.memory
    held = {part: getattr(memory, part) for part in ("weights", "gradients", "optimizer", "images", "activations")}
    steps = found.total_steps / found.epochs
    rows = [
        (
            "batch",
            f"{found.global_batch:,} = {counted(ranks, 'rank')} x {found.accumulation} accumulated x "
            f"{found.micro_batch} at once" + (f", ZeRO stage {recipe.engine.zero_stage}" if ranks > 1 else ""),
        ),
        ("steps", f"{found.total_steps:,} = {number(found.epochs)} epochs x {steps:,.0f}"),
        ("memory", f"{_gib(memory.total)} GiB: " + ", ".join(f"{part} {_gib(size)}" for part, size in held.items())),
        (
            "step",
            f"{_ms(found.step_s)} ms: forward {_ms(found.forward_s)}, backward {_ms(found.backward_s)}, "
            f"update {_ms(found.update_s)}, communication {_ms(found.communication_s)}",
        ),
        (
            "work",
            f"{number(found.flops / 1e12)} TFLOP and {number(found.bytes / 1e9)} GB moved per rank and step, at "
            f"{number(found.flops / found.compute_s / 1e12)} TFLOP/s",
        ),
        *(
            (
                "sent",
                f"{number(each.link / 1e9)} GB in the node, {number(each.network / 1e9)} GB between nodes, "
                f"{_ms(each.seconds)} ms: {purpose}",
            )
            for purpose, each in found.sent.items()
        ),
        *([("loaders", f"up to {found.loader_images_per_s:,.0f} images/s")] if found.loader_images_per_s else []),
    ]
    lines = [
        f"{name}: {number(found.days)} days ({duration(86400 * found.days)}) on {device}, "
        f"{number(found.images_per_s)} images/s, "
        f"{_gib(memory.total)} GiB of {_gib(memory.available / MEMORY_SHARE)} per rank",
        *(f"{title:<9}{text}" for title, text in rows),
        *(f"{'limits':<9}{line}" for line in limits(found)),
        *(f"{'helps':<9}{line}" for line in helps(recipe, cluster, found)),
        *(f"{'assumed':<9}{line}" for line in assumptions(cluster, found)),
    ]
    return "\n".join(lines)


def as_dict(name: str, cluster: Cluster, found: Estimate) -> dict[str, Any]:
    """The same for scripts: seconds, bytes and samples."""
    return {
        "recipe": name,
        "gpu": cluster.gpu.name if cluster.gpu else hardware.CPU,
        "gpus": cluster.gpus,
        "nodes": cluster.nodes,
        "days": found.days,
        "images_per_s": found.images_per_s,
        "step_s": found.step_s,
        "compute_s": found.compute_s,
        "communication_s": found.communication_s,
        "memory_bytes": found.memory.total,
        **asdict(found),
        "limits": limits(found),
    }


def limits(found: Estimate) -> list[str]:
    """Sentences about what a step waits for."""
    computing, sending = found.compute_s, found.communication_s
    if found.loader_s > computing + sending:
        return [
            f"The loaders: they need {_ms(found.loader_s)} ms for the images of a step, computing and communication "
            f"{_ms(computing + sending)} ms."
        ]
    lines = []
    if sending > MUCH * found.step_s:
        purpose = max(found.sent, key=lambda each: found.sent[each].seconds)
        lines.append(
            f"Communication takes {sending / found.step_s:.0%} of a step, {_ms(found.sent[purpose].seconds)} ms of it "
            f"for {purpose}."
        )
    names = {"products": "matrix products", "memory": "memory traffic", "launches": "the time of launches"}
    bounds = sorted(found.by_bound.items(), key=lambda each: -each[1])
    listed = ", ".join(f"{share:.0%} by {names[name]}" for name, share in bounds)
    lines += [f"Computing takes {computing / found.step_s:.0%} of a step" + (f", bound {listed}." if listed else ".")]
    return lines


def helps(recipe: Recipe, cluster: Cluster, found: Estimate) -> list[str]:
    """Sentences about what would make the run shorter; they name keys of the recipe."""
    lines, engine = [], recipe.engine
    if found.loader_s > found.compute_s + found.communication_s:
        lines.append("data.workers_per_gpu with more cores, data.hw_decoder_load on a GPU, or smaller image files.")
    if found.stages:
        now = found.stages[engine.zero_stage][1]
        for stage, (size, seconds) in found.stages.items():
            if seconds < 0.99 * now and size <= found.memory.available:
                saved = f"saves {_ms(now - seconds)} ms a step"
                lines.append(f"engine.zero_stage = {stage} fits ({_gib(size)} GiB) and {saved}.")
                break
    at_method = found.sent.get(METHOD)
    if at_method is not None and at_method.seconds > MUCH * found.step_s:
        lines.append("BatchNorm groups of data.samples_per_gpu (BN instead of SyncBN) need no communication.")
    launches = found.by_bound.get("launches", 0.0)
    if launches > MUCH and found.micro_batch < FEW_SAMPLES and cluster.gpus > 1:
        lines.append(f"Fewer GPUs: {found.micro_batch} samples at once leave them waiting for launches.")
    if engine.gradient_cache and found.accumulation > 1 and recipe.model.compares_samples and recipe.model.embeds:
        lines.append("More GPUs, or less memory per sample: without accumulation there is no second forward pass.")
    if found.by_bound.get("memory", 0.0) > 0.5:
        lines.append(
            "engine.compile, which is on by default and not counted here: it joins operations that move memory."
        )
    if found.accumulation == 1 and cluster.gpus > 1 and found.micro_batch == recipe.data.samples_per_gpu:
        lines.append(f"No more GPUs: each has one BatchNorm group of {found.micro_batch}, and none can be divided.")
    return lines or ["More GPUs, while each has enough samples."]


def assumptions(cluster: Cluster, found: Estimate) -> list[str]:
    """What the estimate rests on; docs/scaling.md has the sources."""
    if cluster.gpu is None:
        return [
            f"Each operation was timed here on random numbers, on {counted(hardware.cores(), 'core')}. The loaders' "
            f"work, {1e3 * hardware.CORE_S_PER_IMAGE:.1f} ms of a core for a JPEG of 500 x 375, shares these cores and "
            "is not in the step."
        ]
    gpu, low, high = cluster.gpu, hardware.MOST_SHARE, hardware.LEAST_SHARE
    fixed = found.total_steps * found.communication_s / 86400
    computing = found.total_steps * found.compute_s / 86400 * hardware.SHARE
    lines = [
        f"An eager step reaches {hardware.SHARE:.0%} of what the data sheet allows each operation; published steps "
        f"reach {high:.0%} to {low:.0%}, which makes {number(computing / low + fixed)} to "
        f"{number(computing / high + fixed)} days.",
        "The data sheet: "
        f"{gpu.matrix / 1e12:.0f} TFLOP/s in bfloat16, {gpu.bandwidth / 1e12:.2f} TB/s of memory, "
        f"{gpu.link / 1e9:.0f} GB/s in a node, {8 * gpu.network / 1e9:.0f} Gbit/s per GPU between nodes.",
    ]
    if cluster.gpus > 1:
        lines.append(
            f"Links reach {hardware.LINK_SHARE:.0%}, a collective takes at least {1e6 * hardware.LATENCY_S:.0f} us, "
            "and none overlaps with computing."
        )
    if found.loader_images_per_s:
        lines.append(f"DALI decodes {gpu.decoded:,.0f} JPEGs/s for each GPU, and the storage delivers them.")
    return [*lines, "Sources: docs/scaling.md."]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}" if size < 10 * 2**30 else f"{size / 2**30:.1f}"


def _ms(seconds: float) -> str:
    return number(1e3 * seconds)
