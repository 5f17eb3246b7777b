"""The usual baseline: PIL in the workers of a DataLoader, torchvision's semantics, one decode for all views.

It is hand-written, since torchvision is not installed here, and lean: random numbers come from the standard library,
blur is PIL's own filter as in MoCo's code.
"""

import math
import random
from collections.abc import Callable, Iterable

import numpy as np
import torch
from passes import RepeatedBatches
from PIL import Image, ImageEnhance, ImageFilter
from torch.utils.data import DataLoader, Dataset

from sslrun.data.transforms import (
    ColorJitter,
    GaussianBlur,
    Normalize,
    RandomAppliedTrans,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Transform,
)
from sslrun.data.views import ViewGroup

ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def crop(image: Image.Image, transform: RandomResizedCrop) -> Image.Image:
    """A random box, resized; the whole image if ten tries fail."""
    width, height = image.size
    low, high = (math.log(ratio) for ratio in transform.ratio)
    for _ in range(10):
        area = width * height * random.uniform(*transform.scale)
        aspect = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            image = image.crop((left, top, left + w, top + h))
            break
    return image.resize(transform.size[::-1], Image.Resampling[transform.interpolation.upper()])


def jitter(image: Image.Image, transform: ColorJitter) -> Image.Image:
    """The four operations in random order."""
    for operation in random.sample(range(4), 4):
        low, high = transform.ranges[operation]
        if low == high:
            continue
        factor = random.uniform(low, high)
        if operation < 3:
            image = ENHANCERS[operation](image).enhance(factor)
        else:
            hue, saturation, value = image.convert("HSV").split()
            turned = np.array(hue) + np.array(factor * 255).astype(np.int32).astype(np.uint8)
            image = Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
    return image


def view(image: Image.Image, transforms: list[Transform]) -> Image.Image:
    """One view of a decoded image."""
    for transform in transforms:
        if isinstance(transform, Normalize) or random.random() >= transform.p:
            continue
        if isinstance(transform, RandomResizedCrop):
            image = crop(image, transform)
        elif isinstance(transform, ColorJitter):
            image = jitter(image, transform)
        elif isinstance(transform, RandomGrayscale):
            image = image.convert("L").convert("RGB")
        elif isinstance(transform, GaussianBlur):
            sigma = random.uniform(transform.sigma_min, transform.sigma_max)
            image = image.filter(ImageFilter.GaussianBlur(radius=sigma))
        elif isinstance(transform, RandomHorizontalFlip):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            assert isinstance(transform, RandomAppliedTrans)
            image = view(image, transform.transforms)
    return image


class Images(Dataset):
    """All views of the image at an index, normalized, (3, h, w) each."""

    def __init__(self, paths: list[str], groups: list[ViewGroup]) -> None:
        self.paths, self.groups = paths, groups

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        with open(self.paths[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        made = []
        for group in self.groups:
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (group.normalize.mean, group.normalize.std))
            for _ in range(group.num_views):
                pixels = torch.from_numpy(np.array(view(image, group.transforms))).permute(2, 0, 1).contiguous()
                made.append(pixels.float().div_(255).sub_(mean).div_(std))
        return made


def pil_loader(
    paths: list[str], groups: list[ViewGroup], batch_size: int, workers: int
) -> Callable[[int], Iterable[list[torch.Tensor]]]:
    """A function that gives a number of batches of views, from worker processes that persist between passes."""
    order = RepeatedBatches(len(paths), batch_size)
    loader = DataLoader(Images(paths, groups), batch_sampler=order, num_workers=workers, persistent_workers=True)

    def batches(count: int) -> DataLoader:
        order.count = count
        return loader

    return batches
