"""Opens a trained encoder, from a run folder, a checkpoint or a file of weights, for evaluation, report and export."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sslrun import run_state
from sslrun.allowed_imports import require_allowed
from sslrun.config import Config, load
from sslrun.config.node import as_key, lookup
from sslrun.contract import Backbone
from sslrun.errors import UsageError
from sslrun.plan import steps_per_epoch
from sslrun.recipe import Recipe
from sslrun.runtime import checkpoint
from sslrun.runtime.run_files import CONFIG, run_folder_of
from sslrun.runtime.run_folder import config_changes
from sslrun.session import build

logger = logging.getLogger("sslrun")

FILES = (".pth", ".safetensors")
PREFIX = "backbone."


@dataclass(frozen=True)
class Saved:
    """A trained encoder, on the CPU.

    Attributes:
        config: the run's resolved recipe with absolute paths, merged with overlays and overrides.
        recipe: the recipe's objects. The backbone has the trained weights; the rest of the model has random ones.
        name: the recipe's full name.
        weights: the checkpoint, or the file, that the weights were read from.
        folder: the run folder; None for a file of weights.
        step: optimizer steps that the weights were trained for; None for a file of weights.
        epoch: the same in epochs.
    """

    config: Config
    recipe: Recipe
    name: str
    weights: Path
    folder: Path | None = None
    step: int | None = None
    epoch: float | None = None

    @property
    def backbone(self) -> Backbone:
        """The encoder, in evaluation mode."""
        return self.recipe.model.backbone


def open_saved(
    path: Path, overlays: Sequence[Path] = (), overrides: Sequence[str] = (), recipe: Path | None = None
) -> Saved:
    """Reads a trained encoder.

    Args:
        path: a run folder, whose newest good checkpoint is used; a checkpoint in a run folder; or a file of weights
            (.pth, .safetensors) whose names begin with "backbone.".
        overlays: TOML files merged over the run's recipe, such as those of configs/benchmarks.
        overrides: `KEY=VALUE` texts merged last.
        recipe: the recipe of a file of weights; None for a run, which has its own.

    Raises:
        UsageError: `path` does not exist or is damaged, weights and recipe do not belong together, or the recipe names
            a module that may not be imported.
    """
    if path.suffix in FILES:
        if recipe is None:
            checkpoint.load_weights(path)  # what is no file of ours is said first
            raise UsageError(
                f"{path} holds only weights: set --recipe to their TOML recipe; {checkpoint.foreign_hint(path)}"
            )
        config = load(recipe, overrides, overlays=overlays)
        built = _built(config, path, checkpoint.load_weights(path))
        return Saved(config.with_absolute_paths(Recipe), built, config.name, path)
    if recipe is not None:
        raise UsageError(f"{path} is a run, which has its own recipe: --recipe is for files of weights")
    if path.suffix == ".toml" and path.is_file():
        raise UsageError(f"{path} is a recipe: name a run folder, a checkpoint in one, or a file of weights")
    if path.is_file() or ((path / "config.json").is_file() and not (path / checkpoint.MANIFEST).is_file()):
        raise UsageError(f"{path} is neither a run nor a checkpoint of one; {checkpoint.foreign_hint(path)}")
    weights = checkpoint.find(path).resolve()
    folder = run_folder_of(weights)
    if folder is None or not (folder / CONFIG).is_file():
        raise UsageError(f"{weights} is not in a run folder, whose {CONFIG} is the recipe of the weights")
    config = load(folder / CONFIG, overrides, overlays=overlays)
    tensors, state = run_state.load(weights)
    built = _built(config, weights, tensors["model"])
    epoch = state.step / steps_per_epoch(built, state.num_samples)
    recorded = config.with_absolute_paths(Recipe)
    if relative := _relative_paths(config, recorded):
        logger.warning(
            "%s has relative paths (%s), which start from %s now", folder / CONFIG, ", ".join(relative), os.getcwd()
        )
    return Saved(recorded, built, folder.name, weights, folder, state.step, epoch)


def _relative_paths(config: Config, recorded: Config) -> list[str]:
    """The keys of relative paths that the file of a run holds: earlier versions did not make them absolute."""
    changed = [key for key, _ in config_changes(config.values, recorded.values)]
    origins = {key: node.where for key in changed if (node := lookup(config.root, as_key(key)))}
    return [key for key, origin in origins.items() if origin.key is not None and origin.layer.order == 0]


def _built(config: Config, weights: Path, tensors: Mapping[str, Tensor]) -> Recipe:
    """The recipe's objects, with the trained backbone."""
    require_allowed(config, is_for_training=False)
    recipe = build(config)
    own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    if not own:
        problem = f"{weights} has no weights of a backbone (names that begin with {PREFIX!r})"
        raise UsageError(f"{problem}; {checkpoint.foreign_hint(weights)}")
    backbone = recipe.model.backbone
    try:
        backbone.load_state_dict(own)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        hint = f"; {checkpoint.foreign_hint(weights)}" if "key(s) in state_dict" in reason else ""
        raise UsageError(f"{weights} does not fit the backbone of {config.path}: {reason}{hint}") from error
    backbone.eval()
    return recipe
