"""What a vision transformer finds alike: the principal components of its patches as colors."""

import numpy as np
from PIL import Image

from sslrun.report.encoder_outputs import EncoderOutputs, examples, patch_features
from sslrun.report.html import Child, element
from sslrun.report.tiles import THUMBNAIL, fitted, tile

SHOWN = 8  # images
CUT_PCT = 1.0  # of the values at each end are the darkest and the brightest


def patch_colors(outputs: EncoderOutputs) -> list[Child]:
    """Images, and beside each its patches in colors; nothing if the encoder is no vision transformer."""
    found = patch_features(outputs, examples(outputs, SHOWN))
    if found is None:
        return []
    images, features = found
    colors, share = components_as_colors(features)
    rows = []
    for image, color in zip(images, colors, strict=True):
        large = Image.fromarray(color).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.NEAREST)
        tiles = [tile(fitted(image), "input image", "image", "query")]
        rows.append(element("li", [*tiles, tile(np.asarray(large), "patches as colors", "patches")]))
    text = (
        "The first three principal components of the last block's patches, over all images of this section together, "
        "as red, green and blue: patches of one color are alike to the encoder. The three have "
        f"{100 * share:.0f} % of the variance. A color means nothing by itself, and differs from run to run."
    )
    return [element("p", text), element("ol", rows, class_="pairs")]


def components_as_colors(features: np.ndarray) -> tuple[np.ndarray, float]:
    """The first three principal components of patches, each from its smallest to its largest value.

    Args:
        features: (n, G, G, D), of n images.

    Returns:
        (n, G, G, 3) uint8, and the components' share of the variance.
    """
    rows = features.reshape(-1, features.shape[-1]).astype(np.float64)
    rows = rows - rows.mean(axis=0)
    variances, directions = np.linalg.eigh(rows.T @ rows)
    first = directions[:, ::-1][:, :3]
    largest = np.abs(first).argmax(axis=0)
    first = first * np.sign(first[largest, np.arange(first.shape[1])])  # the same colors on every machine
    scores = rows @ first
    low, high = np.percentile(scores, [CUT_PCT, 100 - CUT_PCT], axis=0)
    colors = ((scores - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    share = variances[::-1][:3].sum() / max(variances.sum(), 1e-12)
    return (255 * colors).round().astype(np.uint8).reshape(*features.shape[:-1], -1), float(share)
