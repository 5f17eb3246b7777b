"""The transforms once more, as torchvision does them on PIL images: what both modes are held against.

A twin takes one PIL image and the transform's parameters of that image. torchvision itself is not imported: its
arithmetic on PIL images is a few lines for each transform, its tensor blur is one convolution.
"""

from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from sslrun.data.graph import Arguments, numbers_of
from sslrun.data.transforms import (
    ColorJitter,
    Crop,
    GaussianBlur,
    Parameters,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomRotation,
    Resample,
    Solarization,
    Transform,
)
from sslrun.data.transforms.color import BRIGHTNESS, CONTRAST, HUE, SATURATION
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError

Blur = Callable[[Image.Image, float], Image.Image]

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def tensor_blur(image: Image.Image, sigma: float) -> Image.Image:
    """torchvision's tensor version: one two-dimensional kernel, reflected border, rounded once; 31 taps."""
    reach = 15
    distance = torch.arange(-reach, reach + 1, dtype=torch.float64)
    line = torch.exp(-0.5 * (distance / sigma) ** 2)
    line = line / line.sum()
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, None].double()
    x = torch.nn.functional.pad(x, (reach,) * 4, mode="reflect")
    x = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))
    return Image.fromarray(x[:, 0].round().to(torch.uint8).permute(1, 2, 0).numpy())


def pil_blur(image: Image.Image, sigma: float) -> Image.Image:
    """PIL's own: three box blurs."""
    return image.filter(ImageFilter.GaussianBlur(radius=sigma))


def jitter(image: Image.Image, operation: int, factor: float) -> Image.Image:
    """One operation of the jitter; `factor` as in the transform's parameters."""
    if operation == BRIGHTNESS:
        return ImageEnhance.Brightness(image).enhance(factor)
    if operation == CONTRAST:
        return ImageEnhance.Contrast(image).enhance(factor)
    if operation == SATURATION:
        return ImageEnhance.Color(image).enhance(factor)
    assert operation == HUE
    hue, saturation, value = image.convert("HSV").split()
    turned = np.array(hue) + np.array(factor).astype(np.int32).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


@singledispatch
def twin(transform: Transform, image: Image.Image, numbers: Parameters) -> Image.Image:
    """What a transform that applies does to one image; a transform of one's own registers its function here.

    Args:
        transform: the transform.
        image: RGB.
        numbers: the transform's parameters of this image, numbers or (k,).
    """
    raise AssertionError("has_twin lets no transform through that has no twin")


def has_twin(transform: Transform) -> bool:
    """Whether `twin` knows the transform."""
    return twin.dispatch(type(transform)) is not twin.dispatch(object)


@twin.register
def _(transform: Resample, image: Image.Image, numbers: Parameters) -> Image.Image:
    top, left, height, width = map(int, numbers["box"])
    rows, columns = map(int, numbers["size"])
    crop = image.crop((left, top, left + width, top + height))
    return crop.resize((columns, rows), FILTERS[transform.interpolation])


@twin.register
def _(transform: Crop, image: Image.Image, numbers: Parameters) -> Image.Image:
    (top, left), (height, width) = map(int, numbers["start"]), map(int, numbers["size"])
    return image.crop((left, top, left + width, top + height))


@twin.register
def _(transform: RandomRotation, image: Image.Image, numbers: Parameters) -> Image.Image:
    return image.rotate(transform.describe(numbers)["counter_clockwise_degrees"])


@twin.register
def _(transform: RandomHorizontalFlip, image: Image.Image, numbers: Parameters) -> Image.Image:
    return ImageOps.mirror(image)


@twin.register
def _(transform: ColorJitter, image: Image.Image, numbers: Parameters) -> Image.Image:
    for operation in numbers["order"]:
        if operation >= 0:
            image = jitter(image, operation, float(numbers["factors"][operation]))
    return image


@twin.register
def _(transform: RandomGrayscale, image: Image.Image, numbers: Parameters) -> Image.Image:
    return image.convert("L").convert("RGB")


@twin.register
def _(transform: GaussianBlur, image: Image.Image, numbers: Parameters) -> Image.Image:
    return pil_blur(image, float(numbers["sigma"]))


@twin.register
def _(transform: Solarization, image: Image.Image, numbers: Parameters) -> Image.Image:
    return ImageOps.solarize(image, transform.threshold)


def views(
    decoded: Sequence[np.ndarray], groups: Sequence[ViewGroup], arguments: Arguments, blur: Blur | None = None
) -> list[np.ndarray | None]:
    """The views of a batch, made by PIL.

    Args:
        decoded: B images, (H, W, 3) uint8.
        groups: view groups.
        arguments: of `view_arguments` for these images.
        blur: in place of PIL's own.

    Returns:
        For each group (num_views * B, h, w, 3) uint8, view-major; None where one of its transforms has no twin.
    """
    result: list[np.ndarray | None] = []
    for g, group in enumerate(groups):
        if not all(has_twin(transform) for _, transform in group.steps):
            result.append(None)
            continue
        made = []
        for row in range(group.num_views * len(decoded)):
            image = Image.fromarray(decoded[row % len(decoded)])
            for step, transform in group.steps:
                numbers = {name: values[row] for name, values in numbers_of(arguments, f"{g}.{step}").items()}
                if not numbers["apply"]:
                    continue
                if blur is not None and isinstance(transform, GaussianBlur):
                    image = blur(image, float(numbers["sigma"]))
                else:
                    image = twin(transform, image, numbers)
            made.append(np.asarray(image))
        result.append(np.stack(made))
    return result


def decode(file: str | IO[bytes]) -> np.ndarray:
    """(H, W, 3) uint8, as torchvision's loader reads it.

    Raises:
        UsageError: PIL cannot; one line.
    """
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's plugins raise whatever a damaged file leads them to
        raise UsageError(f"{file}: PIL cannot read it: {error}") from None
