"""The first samples of an epoch, decoded and augmented as a run does it.

The views at a position of an epoch are those of a run, bit by bit: how many are made at once, and by how many
processes, changes nothing about them.
"""

import io
import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from sslrun.config import Config
from sslrun.contract import Method
from sslrun.data import pil_twins
from sslrun.data.masks import masks_of
from sslrun.data.pictures import as_bytes
from sslrun.data.pipeline import BatchSpec
from sslrun.data.sources import Source
from sslrun.data.transforms import Numbers, Transform
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError
from sslrun.plan import device_of
from sslrun.run_parts import make_loader
from sslrun.runtime.log import start_logging
from sslrun.session import build

logger = logging.getLogger("sslrun")

MAX_SAMPLES = 100
HIDDEN = 150  # gray level of hidden patches


@dataclass(frozen=True)
class Samples:
    """B samples and V views of each.

    Attributes:
        name: name of the recipe.
        seed: seed of the run.
        augment: mode in which the views were made, "exact" or "dali".
        device: type of the device on which the views were made.
        groups: the view groups of the recipe.
        source: the opened source of the samples.
        plan: positions, sample ids, sizes, and the numbers of the transforms.
        wanted: (B,) ids of the samples that would stand at these positions if no image were bad.
        originals: B decoded images, (H, W, C) uint8.
        views: for each group (num_views * B, h, w, C) uint8, view-major.
        masks: for each group (num_views * B, rows, columns) bool, the hidden patches; None for a group without a mask.
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
    masks: list[np.ndarray | None]

    @property
    def columns(self) -> list[tuple[int, int]]:
        """Group, and number in it, of each of the V views."""
        return [(g, view) for g, group in enumerate(self.groups) for view in range(group.num_views)]

    def line(self, view: int, row: int) -> int:
        """The index of a view of a sample in the arrays of its group."""
        return view * len(self.originals) + row

    def hidden(self, g: int, view: int, row: int) -> np.ndarray | None:
        """(rows, columns) bool, the hidden patches of one view of one sample; None if the group has no mask."""
        masks = self.masks[g]
        return None if masks is None else masks[self.line(view, row)]

    def shown(self, g: int, view: int, row: int) -> np.ndarray:
        """(h, w, C) uint8: one view of one sample; its hidden patches are gray."""
        pixels, hidden = self.views[g][self.line(view, row)], self.hidden(g, view, row)
        if hidden is None:
            return pixels
        patch = len(pixels) // len(hidden)
        return np.where(hidden.repeat(patch, 0).repeat(patch, 1)[:, :, None], np.uint8(HIDDEN), pixels)

    def steps(self, g: int, view: int, row: int) -> list[tuple[Transform, Numbers]]:
        """The transforms of one view of one sample, each with its numbers."""
        line = self.line(view, row)
        return [
            (step, numbers.rows(line))
            for step, numbers in zip(self.groups[g].steps, self.plan.arguments[g], strict=True)
        ]


def load_samples(config: Config, samples: int = 8, epoch: int = 0) -> Samples:
    """The first samples of an epoch, made as training makes them; fewer where the source has fewer.

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
    _warn_where_order_differs(recipe.model)
    count = min(samples, len(source))
    threads = min(recipe.data.workers_per_gpu, len(os.sched_getaffinity(0)))
    reading: dict[str, Any] = {"device": device, "augment": recipe.data.augment, "num_threads": threads}
    loader = make_loader(recipe, source, count, reading)
    cursor = [(epoch, np.arange(count))]
    while True:
        ((plan, originals),) = loader.decoded(cursor)
        (batch,) = loader.run(cursor)
        if np.array_equal(plan.ids, batch.index.cpu().numpy()):
            break  # otherwise one of the two found a bad image, which both replace in the next pass
    return Samples(
        name=config.name,
        seed=recipe.seed,
        augment=loader.augment,
        device=device.type,
        groups=recipe.data.views,
        source=source,
        plan=plan,
        wanted=loader.sampler.ids(epoch, plan.positions),
        originals=[image.numpy() for image in originals],
        views=[as_bytes(views, group) for views, group in zip(batch.views, recipe.data.views, strict=True)],
        masks=masks_of(recipe.data.views, recipe.seed, epoch, plan.positions),
    )


def pil_versions(samples: Samples) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """Originals and views, read and made by PIL with the same draws; None for groups that PIL cannot make."""
    source, originals = samples.source, samples.originals
    if source.channels not in (1, 3):
        logger.warning("PIL has no images of %d channels: the views are shown alone", source.channels)
    elif not source.is_decoded:
        originals = [
            pil_twins.decode(io.BytesIO(bytes(file)), source.channels) for file in source.encoded(samples.plan.ids)
        ]
    for g, group in enumerate(samples.groups):
        without = sorted({type(step).__name__ for step in group.steps if step.pil is None})
        if without:
            logger.warning("no PIL twin of %s: the views of data.views.%d are shown alone", ", ".join(without), g)
    return originals, pil_twins.views(originals, samples.groups, samples.plan.arguments)


def _warn_where_order_differs(method: Method) -> None:
    if method.draws_clusters:
        logger.warning(
            "%s draws from clusters that only a run has: it will have other samples at these positions",
            type(method).__name__,
        )
