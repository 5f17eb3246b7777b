"""Real photographs, which come with scikit-learn and scikit-image."""

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image


@cache
def photographs() -> list[np.ndarray]:
    """Eight color photographs, (H, W, 3) uint8, from 300 to 1000 pixels a side."""
    import skimage
    import sklearn

    of_sklearn = Path(sklearn.__file__).parent / "datasets" / "images"
    of_skimage = Path(skimage.__file__).parent / "data"
    files = [of_sklearn / "china.jpg", of_sklearn / "flower.jpg"]
    names = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png", "rocket.jpg")
    files += [of_skimage / name for name in names]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def jpeg(pixels: np.ndarray, quality: int = 92) -> bytes:
    """The image as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
