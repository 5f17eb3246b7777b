"""The transforms once more, as torchvision does them on PIL pictures: what both modes are held against.

A twin takes one PIL picture and the transform's parameters of that picture. torchvision itself is not imported: its
arithmetic on PIL pictures is a few lines for each transform, its tensor blur is one convolution.
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
from sslrun.data.transforms.colour import BRIGHTNESS, CONTRAST, HUE, SATURATION
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError

Blur = Callable[[Image.Image, float], Image.Image]

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


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


@singledispatch
def twin(transform: Transform, picture: Image.Image, numbers: Parameters) -> Image.Image:
    """What a transform that applies does to one picture; a transform of one's own registers its function here.

    Args:
        transform: the transform.
        picture: RGB.
        numbers: the transform's parameters of this picture, numbers or (k,).
    """
    raise AssertionError("has_twin lets no transform through that has no twin")


def has_twin(transform: Transform) -> bool:
    """Whether `twin` knows the transform."""
    return twin.dispatch(type(transform)) is not twin.dispatch(object)


@twin.register
def _(transform: Resample, picture: Image.Image, numbers: Parameters) -> Image.Image:
    top, left, height, width = map(int, numbers["box"])
    rows, columns = map(int, numbers["size"])
    crop = picture.crop((left, top, left + width, top + height))
    return crop.resize((columns, rows), FILTERS[transform.interpolation])


@twin.register
def _(transform: Crop, picture: Image.Image, numbers: Parameters) -> Image.Image:
    (top, left), (height, width) = map(int, numbers["start"]), map(int, numbers["size"])
    return picture.crop((left, top, left + width, top + height))


@twin.register
def _(transform: RandomRotation, picture: Image.Image, numbers: Parameters) -> Image.Image:
    return picture.rotate(transform.describe(numbers)["counter_clockwise_degrees"])


@twin.register
def _(transform: RandomHorizontalFlip, picture: Image.Image, numbers: Parameters) -> Image.Image:
    return ImageOps.mirror(picture)


@twin.register
def _(transform: ColorJitter, picture: Image.Image, numbers: Parameters) -> Image.Image:
    for operation in numbers["order"]:
        if operation >= 0:
            picture = jitter(picture, operation, float(numbers["factors"][operation]))
    return picture


@twin.register
def _(transform: RandomGrayscale, picture: Image.Image, numbers: Parameters) -> Image.Image:
    return picture.convert("L").convert("RGB")


@twin.register
def _(transform: GaussianBlur, picture: Image.Image, numbers: Parameters) -> Image.Image:
    return pil_blur(picture, float(numbers["sigma"]))


@twin.register
def _(transform: Solarization, picture: Image.Image, numbers: Parameters) -> Image.Image:
    return ImageOps.solarize(picture, transform.threshold)


def views(
    decoded: Sequence[np.ndarray], groups: Sequence[ViewGroup], arguments: Arguments, blur: Blur | None = None
) -> list[np.ndarray | None]:
    """The views of a batch, made by PIL.

    Args:
        decoded: B pictures, (H, W, 3) uint8.
        groups: view groups.
        arguments: of `view_arguments` for these pictures.
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
            picture = Image.fromarray(decoded[row % len(decoded)])
            for step, transform in group.steps:
                numbers = {name: values[row] for name, values in numbers_of(arguments, f"{g}.{step}").items()}
                if not numbers["apply"]:
                    continue
                if blur is not None and isinstance(transform, GaussianBlur):
                    picture = blur(picture, float(numbers["sigma"]))
                else:
                    picture = twin(transform, picture, numbers)
            made.append(np.asarray(picture))
        result.append(np.stack(made))
    return result


def decode(file: str | IO[bytes]) -> np.ndarray:
    """(H, W, 3) uint8, as torchvision's loader reads it.

    Raises:
        UsageError: PIL cannot; one line.
    """
    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # Pillow's plugins raise whatever a damaged file leads them to
        raise UsageError(f"{file}: PIL cannot read it: {error}") from None
