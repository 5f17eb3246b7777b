"""What a method that predicts pixels makes of images whose patches are hidden."""

import numpy as np
import torch
from torch import Tensor

from sslrun.contract import Method, PatchMask
from sslrun.data.masks import masks_of
from sslrun.data.pictures import as_rgb
from sslrun.data.views import ViewGroup
from sslrun.evaluation.features import center_crop_like
from sslrun.preview.samples import HIDDEN
from sslrun.report.encoder_outputs import EncoderOutputs, examples, prepared
from sslrun.report.html import Child, element
from sslrun.report.tiles import fitted, tile
from sslrun.runtime import checkpoint
from sslrun.session import build

SHOWN = 6  # images


def reconstructions(outputs: EncoderOutputs) -> list[Child]:
    """Images, their visible patches and the predicted pixels of the others; nothing if a method predicts no pixels."""
    saved = outputs.saved
    if type(saved.recipe.model).reconstructed is Method.reconstructed:
        return []
    method = build(saved.config).model
    method.load_state_dict(checkpoint.load_weights(saved.weights))
    places = examples(outputs, SHOWN)
    group = saved.recipe.data.views[0]
    pixels = prepared(outputs, outputs.source, outputs.queries[places], center_crop_like(group))
    (hidden,) = masks_of([group], saved.recipe.seed, 0, np.arange(len(places)))
    assert hidden is not None, "methods that predict pixels need masks"
    predicted = predictions(method.eval().to(outputs.encoder.device), pixels, hidden, group)
    side = pixels.shape[1] // hidden.shape[1]
    rows = []
    for image, mask, made in zip(as_rgb(pixels.numpy()), hidden, as_rgb(predicted), strict=True):
        covered = np.where(mask.repeat(side, 0).repeat(side, 1)[:, :, None], np.uint8(HIDDEN), image)
        tiles = [
            tile(fitted(image), "image", "image", "query"),
            tile(fitted(covered), "the image with its hidden patches in gray", "visible"),
            tile(fitted(made), "the image with predicted pixels in the hidden patches", "predicted"),
        ]
        rows.append(element("li", tiles))
    held_out = "Held-out images" if outputs.is_held_out else "Training images"
    text = (
        f"{held_out} with the masks of the recipe: {100 * hidden.mean():.0f} % of the patches are hidden, gray in the "
        "middle. On the right, the network's prediction is in their place; the visible patches are those of the image."
    )
    if getattr(method, "norm_pix", False):
        text += (
            " The network predicts normalized patches: mean and contrast of each hidden patch are taken from the image."
        )
    return [element("p", text), element("ol", rows, class_="attention")]


@torch.no_grad()
def predictions(method: Method, pixels: Tensor, hidden: np.ndarray, group: ViewGroup) -> np.ndarray:
    """(n, H, W, C) uint8: the images with predicted pixels in the hidden patches.

    Args:
        method: it predicts pixels; in evaluation mode.
        pixels: (n, H, W, C) uint8.
        hidden: (n, rows, columns) bool, as many True for each image.
        group: the view group, which says how pixels are normalized.
    """
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (group.normalize.mean, group.normalize.std))
    device = next(method.parameters()).device
    normalized = ((pixels.permute(0, 3, 1, 2) / 255 - mean) / std).to(device)
    mask = PatchMask(torch.from_numpy(hidden).flatten(1).to(device), int(hidden.sum()))
    made = method.reconstructed(normalized, mask)
    assert made is not None
    return ((made.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
