"""The transforms once more, as torchvision does them on PIL pictures: what both modes are held against.

A twin takes one PIL picture and the transform's parameters of that picture. torchvision itself is not imported: its
arithmetic on PIL pictures is a few lines for each transform, its tensor blur is one convolution.
"""

import io
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from sslrun.data.graph import Arguments
from sslrun.data.transforms import (
    ColorJitter,
    Crop,
    GaussianBlur,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomRotation,
    Resample,
    Solarization,
    Transform,
)
from sslrun.data.transforms.colour import BRIGHTNESS, CONTRAST, HUE, SATURATION
from sslrun.data.views import ViewGroup

Numbers = dict[str, np.ndarray]
Blur = Callable[[Image.Image, float], Image.Image]

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@cache
def photographs() -> list[np.ndarray]:
    """Eight colour photographs, (H, W, 3) uint8, from 300 to 1000 pixels a side."""
    import skimage
    import sklearn

    images = Path(sklearn.__file__).parent / "datasets" / "images"
    pictures = Path(skimage.__file__).parent / "data"
    files = [images / "china.jpg", images / "flower.jpg"]
    names = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png", "rocket.jpg")
    files += [pictures / name for name in names]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def jpeg(pixels: np.ndarray, quality: int = 92) -> bytes:
    """The picture as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def decode(file: bytes) -> np.ndarray:
    """(H, W, 3) uint8, as torchvision's loader reads it."""
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def tensor_blur(picture: Image.Image, sigma: float) -> Image.Image:
    """torchvision's tensor version: one two-dimensional kernel, reflected border, rounded once; 31 taps."""
    reach = 15
    distance = torch.arange(-reach, reach + 1, dtype=torch.float64)
    line = torch.exp(-0.5 * (distance / sigma) ** 2)
    line = line / line.sum()
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, None].double()
    x = torch.nn.functional.pad(x, (reach,) * 4, mode="reflect")
    x = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))
    return Image.fromarray(x[:, 0].round().to(torch.uint8).permute(1, 2, 0).numpy())


def pil_blur(picture: Image.Image, sigma: float) -> Image.Image:
    """PIL's own: three box blurs."""
    return picture.filter(ImageFilter.GaussianBlur(radius=sigma))


def jitter(picture: Image.Image, operation: int, factor: float) -> Image.Image:
    """One operation of the jitter; `factor` as in the transform's parameters."""
    if operation == BRIGHTNESS:
        return ImageEnhance.Brightness(picture).enhance(factor)
    if operation == CONTRAST:
        return ImageEnhance.Contrast(picture).enhance(factor)
    if operation == SATURATION:
        return ImageEnhance.Color(picture).enhance(factor)
    assert operation == HUE
    hue, saturation, value = picture.convert("HSV").split()
    turned = np.array(hue) + np.array(factor).astype(np.int32).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def apply(transform: Transform, picture: Image.Image, numbers: Numbers, blur: Blur = tensor_blur) -> Image.Image:
    """What the transform does to one picture."""
    if not numbers["apply"]:
        return picture
    if isinstance(transform, Resample):
        top, left, height, width = map(int, numbers["box"])
        rows, columns = map(int, numbers["size"])
        crop = picture.crop((left, top, left + width, top + height))
        return crop.resize((columns, rows), FILTERS[transform.interpolation])
    if isinstance(transform, Crop):
        (top, left), (height, width) = map(int, numbers["start"]), map(int, numbers["size"])
        return picture.crop((left, top, left + width, top + height))
    if isinstance(transform, RandomRotation):
        a, b, *_ = numbers["affine"]
        return picture.rotate(math.degrees(math.atan2(-b, a)))
    if isinstance(transform, RandomHorizontalFlip):
        return ImageOps.mirror(picture)
    if isinstance(transform, ColorJitter):
        for operation in numbers["order"]:
            if operation >= 0:
                picture = jitter(picture, operation, float(numbers["factors"][operation]))
        return picture
    if isinstance(transform, RandomGrayscale):
        return picture.convert("L").convert("RGB")
    if isinstance(transform, GaussianBlur):
        return blur(picture, float(numbers["sigma"]))
    assert isinstance(transform, Solarization)
    return ImageOps.solarize(picture, transform.threshold)


def views(
    decoded: list[np.ndarray], groups: list[ViewGroup], arguments: Arguments, blur: Blur = tensor_blur
) -> list[np.ndarray]:
    """For each group, (num_views * B, h, w, 3) uint8."""
    result = []
    for g, group in enumerate(groups):
        made = []
        for row in range(group.num_views * len(decoded)):
            picture = Image.fromarray(decoded[row % len(decoded)])
            for step, transform in group.steps:
                prefix = f"{g}.{step}"
                own = {k.removeprefix(prefix): v[row] for k, v in arguments.items() if k.startswith(prefix)}
                picture = apply(transform, picture, own, blur)
            made.append(np.asarray(picture))
        result.append(np.stack(made))
    return result
