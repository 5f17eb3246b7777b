"""How a recipe prepares images for its encoder, without randomness."""

from sslrun.data.transforms import Transform
from sslrun.evaluation.features import center_crop_like
from sslrun.recipe import Recipe


def preparation_of(recipe: Recipe) -> list[Transform]:
    """How images are prepared for a trained encoder: eval.transforms, else as in training."""
    return recipe.eval.transforms or preparation_in_training(recipe)


def preparation_in_training(recipe: Recipe) -> list[Transform]:
    """How images are prepared for the monitors: monitor.transforms, else a center crop as large as the first view."""
    return recipe.monitor.transforms or center_crop_like(recipe.data.views[0])
