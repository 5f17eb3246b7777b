"""Makes the parts of a run from its recipe: loaders, monitors and the executor."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from sslrun.contract import Batch
from sslrun.data.bad_samples import BadSamples
from sslrun.data.classes import matched
from sslrun.data.loader import Loader
from sslrun.data.order import Order
from sslrun.data.sources import Source
from sslrun.evaluation.features import FeatureExtractor
from sslrun.evaluation.monitors.monitors import Monitors
from sslrun.nn.norm import set_groups
from sslrun.plan import Plan
from sslrun.recipe import Recipe
from sslrun.runtime import distributed
from sslrun.runtime.executor import Executor, LocalExecutor
from sslrun.runtime.replicated_executor import ReplicatedExecutor

logger = logging.getLogger("sslrun")


def make_loader(
    recipe: Recipe, source: Source, batch_size: int, reading: dict[str, Any], precision: str = "fp32"
) -> Loader:
    """A loader of the recipe's views of a source's images.

    Args:
        recipe: the recipe, for views, seed, decoding, prefetch and the limit of bad images.
        source: an opened source.
        batch_size: largest number of samples in a batch.
        reading: `device`, `augment` and `num_threads` of the loader.
        precision: "fp32" or "bf16"; of the views on CUDA.
    """
    return Loader(
        source,
        recipe.data.views,
        sampler=Order(len(source), recipe.seed),
        seed=recipe.seed,
        batch_size=batch_size,
        hw_decoder_load=recipe.data.hw_decoder_load,
        prefetch=recipe.data.prefetch,
        bad=BadSamples(recipe.data.max_bad_pct),
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        **reading,
    )


def make_monitors(
    recipe: Recipe, plan: Plan, features: FeatureExtractor, holdout: Source | None, reading: dict[str, Any]
) -> Monitors:
    """The monitors of the `[monitor]` table, with the images that they measure."""
    if holdout is None:
        return Monitors(recipe.monitor, features)
    if recipe.model.num_classes is not None or any(m.needs_labels for m in recipe.monitor.monitors().values()):
        holdout = matched(features.source, holdout)
    held_out = FeatureExtractor(holdout, features.transforms, bf16=features.bf16, **reading)
    loader = make_loader(recipe, holdout, plan.machine.micro_batch, reading, plan.machine.precision)
    return Monitors(recipe.monitor, features, held_out, _held_out_batches(recipe, plan, loader))


def _held_out_batches(recipe: Recipe, plan: Plan, loader: Loader) -> Callable[[], Iterator[list[Batch]]]:
    """Iterates over the whole global batches that the held-out images fill; if they do not fill one, over a single
    batch in which some images are repeated."""
    num_samples = len(loader.source)
    steps = max(1, num_samples // plan.global_batch)
    if recipe.monitor.loss_interval and num_samples < plan.global_batch:
        logger.info(
            "val/loss: the %d held-out images do not fill a global batch of %d, so some of them are repeated",
            num_samples,
            plan.global_batch,
        )
    like_training = replace(plan, steps_per_epoch=steps, total_steps=steps, num_samples=num_samples)
    cursor = [part for step in range(steps) for part in like_training.positions(step, distributed.rank())]

    def batches() -> Iterator[list[Batch]]:
        with contextlib.closing(loader.run(cursor)) as stream:
            while micro_batches := list(itertools.islice(stream, plan.accumulation)):
                yield micro_batches

    return batches


def make_executor(recipe: Recipe, plan: Plan, device: torch.device) -> Executor:
    """The executor of this process; it moves the model to the device."""
    group = recipe.data.samples_per_gpu
    set_groups(recipe.model, group, plan.machine.micro_batch // group)
    clip = recipe.optimizer.grad_clip
    options: dict[str, Any] = {
        "device": device,
        "precision": plan.machine.precision,
        "accumulation": plan.accumulation,
        "grad_clip": None if clip is None else clip.max_norm,
        "norm_type": 2.0 if clip is None else float(clip.norm_type),
        "clip_parts": None if clip is None else clip.parts,
        "max_skipped_steps": recipe.engine.max_skipped_steps,
        "gradient_cache": recipe.engine.gradient_cache,
        "compile": plan.machine.compile,
        "cuda_graphs": plan.machine.cuda_graphs,
    }
    optimizer = recipe.optimizer.create(recipe.model.named_parameters(), recipe.model.backbone)
    if plan.world_size == 1:
        return LocalExecutor(recipe.model, optimizer, **options)
    if plan.machine.precision == "fp64":
        return ReplicatedExecutor(recipe.model, optimizer, **options)
    from sslrun.runtime.deepspeed_executor import DeepSpeedExecutor

    return DeepSpeedExecutor(recipe.model, optimizer, zero_stage=recipe.engine.zero_stage, **options)
