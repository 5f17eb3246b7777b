"""Samples as a run sees them.

The views at a position of an epoch are a run's, bit by bit: how many are made at once, and by how many processes,
changes nothing about them.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sslrun.config import Config
from sslrun.contract import Method
from sslrun.data import Source, pil_twins, resolve_augment
from sslrun.data.graph import numbers_of
from sslrun.data.pipeline import BatchSpec
from sslrun.data.transforms import Parameters, Transform
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError
from sslrun.plan import device_of
from sslrun.runtime.log import start_logging
from sslrun.session import build, make_loader

logger = logging.getLogger("sslrun")

MAX_SAMPLES = 100


@dataclass(frozen=True)
class Look:
    """B samples and V views of each.

    Attributes:
        name: of the recipe.
        seed: of the run.
        augment: mode in which the views were made.
        device: type of the device on which they were.
        groups: the recipe's view groups.
        source: opened.
        plan: positions, sample ids, sizes, and what the transforms do.
        wanted: (B,) ids of the samples that would stand there if none were bad.
        originals: B images as decoded, (H, W, 3) uint8.
        views: for each group (num_views * B, h, w, 3) uint8, view-major.
    """

    name: str
    seed: int
    augment: str
    device: str
    groups: list[ViewGroup]
    source: Source
    plan: BatchSpec
    wanted: np.ndarray
    originals: list[np.ndarray]
    views: list[np.ndarray]

    @property
    def columns(self) -> list[tuple[int, int]]:
        """Group, and number in it, of each of the V views."""
        return [(g, view) for g, group in enumerate(self.groups) for view in range(group.num_views)]

    def line(self, view: int, row: int) -> int:
        """Where a view of a sample stands in the arrays of its group."""
        return view * len(self.originals) + row

    def steps(self, g: int, view: int, row: int) -> list[tuple[Transform, Parameters]]:
        """The transforms of one view of one sample, each with its numbers."""
        line, arguments = self.line(view, row), self.plan.arguments
        return [
            (transform, {name: values[line] for name, values in numbers_of(arguments, f"{g}.{step}").items()})
            for step, transform in self.groups[g].steps
        ]


def look(config: Config, samples: int = 8, epoch: int = 0) -> Look:
    """The first samples of an epoch, made as training makes them; all there are where those are fewer.

    Raises:
        UsageError: something is wrong with the recipe, or data are missing.
        RunFailed: more images are bad than the recipe allows.
    """
    if not 1 <= samples <= MAX_SAMPLES:
        raise UsageError(f"--samples must lie between 1 and {MAX_SAMPLES}, not {samples}")
    if not 0 <= epoch < 2**32:
        raise UsageError(f"--epoch must lie between 0 and {2**32 - 1}, not {epoch}")
    recipe = build(config)
    device = device_of(recipe, 0)
    start_logging(level=recipe.log.level)
    source, _ = recipe.data.open()
    _say_where_order_differs(recipe.model, len(source))
    count = min(samples, len(source))
    threads = min(recipe.data.workers_per_gpu, len(os.sched_getaffinity(0)))
    reading: dict[str, Any] = {"device": device, "augment": recipe.data.augment, "num_threads": threads}
    loader = make_loader(recipe, source, count, reading)
    cursor = [(epoch, np.arange(count))]
    while True:
        ((plan, originals),) = loader.decoded(cursor)
        (batch,) = loader.run(cursor)
        if np.array_equal(plan.ids, batch.index.cpu().numpy()):
            break  # otherwise one of the two found an image to be bad, and by now the other knows
    return Look(
        name=config.name,
        seed=recipe.seed,
        augment=resolve_augment(recipe.data.augment, device),
        device=device.type,
        groups=recipe.data.views,
        source=source,
        plan=plan,
        wanted=loader.sampler.ids(epoch, plan.positions),
        originals=[image.numpy() for image in originals],
        views=[as_bytes(views, group) for views, group in zip(batch.views, recipe.data.views, strict=True)],
    )


def as_bytes(views: torch.Tensor, group: ViewGroup) -> np.ndarray:
    """(N, h, w, 3) uint8, of which normalization made (N, 3, h, w)."""
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (group.normalize.mean, group.normalize.std)
    )
    levels = (views.cpu().double() * std + mean) * 255
    return levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def pil_twins_of(seen: Look) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """Originals and views once more, read and made by PIL with the same draws; None for groups that it cannot make."""
    source = seen.source
    originals = seen.originals
    if not source.is_decoded:
        originals = [pil_twins.decode(source.open_encoded(i)) for i in seen.plan.ids.tolist()]
    for g, group in enumerate(seen.groups):
        strangers = sorted({type(t).__name__ for _, t in group.steps if not pil_twins.has_twin(t)})
        if strangers:
            logger.warning("no PIL twin of %s: the views of data.views.%d are shown alone", ", ".join(strangers), g)
    return originals, pil_twins.views(originals, seen.groups, seen.plan.arguments)


def _say_where_order_differs(method: Method, num_samples: int) -> None:
    if type(method).sampling_labels is Method.sampling_labels:
        return
    method.prepare(num_samples)
    if method.sampling_labels() is not None:
        logger.warning(
            "%s draws from clusters that only a run has: it will have other samples at these positions",
            type(method).__name__,
        )
