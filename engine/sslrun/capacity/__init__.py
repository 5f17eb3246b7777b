"""How long a recipe takes on hardware that need not be here: counted work, stated or measured rates, communication."""

from dataclasses import replace

import torch

from sslrun.capacity import communication, estimation, hardware, work
from sslrun.capacity.estimation import Cluster, Estimate, estimate
from sslrun.config import Config
from sslrun.errors import UsageError
from sslrun.recipe import Recipe
from sslrun.session import build

__all__ = [
    "Cluster", "Estimate", "cluster_of", "communication", "estimate", "estimation", "hardware", "sized", "work",
]  # fmt: skip


def cluster_of(gpu: str, gpus: int, nodes: int, network_gbit: int | None = None) -> Cluster:
    """A cluster of GPUs by their name, or this CPU for "cpu"."""
    if gpu == hardware.CPU:
        return Cluster(None, gpus, nodes)
    known = hardware.GPUS[gpu]
    return Cluster(known if network_gbit is None else replace(known, network=network_gbit * 1e9 / 8), gpus, nodes)


def sized(config: Config, num_samples: int | None = None) -> tuple[Recipe, int]:
    """A recipe whose weights have shapes and, where its networks allow it, no memory; and its number of samples.

    Args:
        config: the recipe.
        num_samples: number of training samples; None for what the data set has, or is published to have.

    Raises:
        UsageError: the recipe has a fault, or its data is not here and its size is not known.
    """
    try:
        with torch.device("meta"):
            recipe = build(config)
    except (UsageError, RuntimeError):  # a fault of the recipe comes again, with its place
        recipe = build(config)
    num_samples = num_samples or recipe.data.source.nominal_size or _number_here(recipe)
    recipe.model.prepare(num_samples)
    return recipe, num_samples


def _number_here(recipe: Recipe) -> int:
    recipe.data.make_nothing()
    try:
        return len(recipe.data.open()[0])
    except UsageError as error:
        raise UsageError(f"{error}; --samples N says how many images there are") from None
