"""Images of any number of channels as people see them."""

import numpy as np


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Pixels (..., C) as RGB (..., 3): the first three channels; with fewer than three, the first as gray."""
    return pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
