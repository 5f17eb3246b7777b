"""Where a vision transformer looks: its attention as a heat map over the image."""

import numpy as np
from PIL import Image

from sslrun.number_format import counted
from sslrun.report.encoder_outputs import EncoderOutputs, attention, examples
from sslrun.report.html import Child, Html, element
from sslrun.report.tiles import THUMBNAIL, fitted, tile

ATTENDED = 4  # images
MOST_HEADS = 12
# matplotlib's "inferno" (Smith & van der Walt 2015, CC0), from no attention to the most, at equal distances.
HEAT = np.array(
    [(0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51), (249, 140, 10),
     (249, 201, 50), (252, 255, 164)],
    dtype=np.float32,
)  # fmt: skip


def attention_maps(outputs: EncoderOutputs) -> list[Child]:
    """Attention of the class token as heat maps: the mean of the heads, then head by head."""
    places = examples(outputs, ATTENDED)
    weights = attention(outputs, places)
    if weights is None:
        kind = type(outputs.encoder.backbone).__name__
        return [element("p", f"Left out: the encoder is a {kind}, not a vision transformer.", class_="note")]
    images, shares = weights
    heads = shares.shape[1]
    rows = []
    for image, share in zip(images, shares, strict=True):
        tiles = [tile(fitted(image), "input image", "image", "query"), _heat_tile(image, share.mean(axis=0), "mean")]
        tiles += [_heat_tile(image, share[head], f"head {head + 1}") for head in range(min(heads, MOST_HEADS))]
        rows.append(element("li", tiles))
    grid = shares.shape[-1]
    more = f" The first {MOST_HEADS} are shown." if heads > MOST_HEADS else ""
    text = (
        f"Attention of the last block's class token to the {grid} x {grid} patches: the mean of the "
        f"{counted(heads, 'head')}, then each head.{more} Each tile has its own scale, from none to its largest value, "
        f"the percentage below it; even attention would be {100 / grid**2:.2g} % everywhere."
    )
    return [element("p", text), _scale(), element("ol", rows, class_="attention")]


def _heat_tile(image: np.ndarray, share: np.ndarray, name: str) -> Html:
    most = f"{100 * share.max():.2g} %"
    alt = f"{name}: at most {most} of the attention is on one patch"
    return tile(heat_map(image, share), alt, f"{name}, {most}")


def heat_map(image: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The image in gray, and over it the attention as color: opaque where it is strong.

    Args:
        image: (H, W, 3) uint8.
        share: (G, G) attention of the patches.

    Returns:
        (THUMBNAIL, THUMBNAIL, 3) uint8.
    """
    light = Image.fromarray((share / max(share.max(), 1e-12)).astype(np.float32))
    strength = np.asarray(light.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)).clip(0, 1)
    gray = fitted(image).astype(np.float32).mean(axis=2, keepdims=True)
    opacity = 0.35 + 0.5 * strength[..., None]
    return ((1 - opacity) * gray + opacity * heat(strength)).clip(0, 255).astype(np.uint8)


def heat(strength: np.ndarray) -> np.ndarray:
    """(..., 3) colors, 0 to 255, of numbers from 0 to 1."""
    place = strength * (len(HEAT) - 1)
    low = np.floor(place).astype(int).clip(0, len(HEAT) - 2)
    rest = (place - low)[..., None]
    return (1 - rest) * HEAT[low] + rest * HEAT[low + 1]


def _scale() -> Html:
    """The colors from no attention to the most."""
    colors = ", ".join(f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in HEAT)
    bar = element("span", class_="heat", style=f"background: linear-gradient(to right, {colors})", aria_hidden="true")
    return element("p", "none ", bar, " the tile's largest", class_="heat-scale")
