"""Images that reach the step as bfloat16: under autocast every method computes the bits that float32 images give."""

import copy

import numpy as np
import pytest
import torch

from learn_recipes import EVERY_RECIPE, RECIPES
from sslrun.config import load
from sslrun.contract import Batch, Progress
from sslrun.data.loader import patch_masks
from sslrun.recipe import Recipe
from sslrun.runtime import distributed
from sslrun.session import build

START = Progress(step=0, total_steps=10, steps_per_epoch=5, seed=0)


def gradients_of(recipe: Recipe, views: list[torch.Tensor]) -> list[torch.Tensor]:
    """Loss and gradients of one step under autocast."""
    method = copy.deepcopy(recipe.model).train()
    count = len(views[0]) // recipe.data.views[0].num_views
    masks = patch_masks(recipe.data.views, 0, 0, np.arange(count))
    batch = Batch(views, torch.arange(count), torch.arange(count) % 2, masks)
    torch.manual_seed(0)
    with distributed.alone(), torch.autocast("cpu", torch.bfloat16):
        (target,) = method.targets([batch], START)
        loss = method(batch, START, target).value
    loss.backward()
    return [loss.detach(), *(p.grad for p in method.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", EVERY_RECIPE)
def test_a_step_is_the_same_with_images_of_either_kind(name):
    recipe = build(load(str(RECIPES[name]), ["data.samples_per_gpu=4", "global_batch=4"]))
    recipe.model.prepare(256)
    random = torch.Generator().manual_seed(0)
    views = [torch.randn(4 * group.num_views, 3, *group.size, generator=random) for group in recipe.data.views]
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    rounded = [view.to(torch.bfloat16) for view in views]
    if recipe.model.needs_masks or getattr(recipe.model, "mixup", False):  # it computes with the pixels that it gets
        views = [view.float() for view in rounded]
    expected = gradients_of(recipe, views)
    own = gradients_of(recipe, rounded)
    assert len(own) > 5 and all(torch.equal(one, other) for one, other in zip(own, expected, strict=True))
    others = gradients_of(recipe, [view.nextafter(torch.tensor(2.0, dtype=torch.bfloat16)) for view in rounded])
    assert not torch.equal(own[1], others[1]), "the last bit of the images is seen"
