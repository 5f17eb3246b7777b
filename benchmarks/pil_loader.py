"""What everybody starts from: PIL in the workers of a DataLoader, torchvision's semantics, one decode for all views.

Hand-written, since torchvision is not installed here, and lean: no classes, random numbers from the standard library,
blur by PIL's own filter as in MoCo's code.
"""

import math
import random

import numpy as np
import torch
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


def crop(picture: Image.Image, transform: RandomResizedCrop) -> Image.Image:
    """A random box, resized; where ten tries fail, the whole picture."""
    width, height = picture.size
    low, high = (math.log(ratio) for ratio in transform.ratio)
    for _ in range(10):
        area = width * height * random.uniform(*transform.scale)
        aspect = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            picture = picture.crop((left, top, left + w, top + h))
            break
    return picture.resize(transform.size[::-1], Image.Resampling.BILINEAR)


def jitter(picture: Image.Image, transform: ColorJitter) -> Image.Image:
    """The four operations in random order."""
    for operation in random.sample(range(4), 4):
        low, high = transform.ranges[operation]
        if low == high:
            continue
        factor = random.uniform(low, high)
        if operation < 3:
            picture = ENHANCERS[operation](picture).enhance(factor)
        else:
            hue, saturation, value = picture.convert("HSV").split()
            turned = np.array(hue) + np.array(factor * 255).astype(np.int32).astype(np.uint8)
            picture = Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
    return picture


def view(picture: Image.Image, transforms: list[Transform]) -> Image.Image:
    """One view of a decoded picture."""
    for transform in transforms:
        if isinstance(transform, Normalize) or random.random() >= transform.p:
            continue
        if isinstance(transform, RandomResizedCrop):
            picture = crop(picture, transform)
        elif isinstance(transform, ColorJitter):
            picture = jitter(picture, transform)
        elif isinstance(transform, RandomGrayscale):
            picture = picture.convert("L").convert("RGB")
        elif isinstance(transform, GaussianBlur):
            sigma = random.uniform(transform.sigma_min, transform.sigma_max)
            picture = picture.filter(ImageFilter.GaussianBlur(radius=sigma))
        elif isinstance(transform, RandomHorizontalFlip):
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            assert isinstance(transform, RandomAppliedTrans)
            picture = view(picture, transform.transforms)
    return picture


class Pictures(Dataset):
    """All views of the picture at an index, normalised, (3, h, w) each."""

    def __init__(self, paths: list[str], groups: list[ViewGroup], count: int) -> None:
        self.paths, self.groups, self.count = paths, groups, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        with open(self.paths[index % len(self.paths)], "rb") as file:
            picture = Image.open(file).convert("RGB")
        made = []
        for group in self.groups:
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (group.normalize.mean, group.normalize.std))
            for _ in range(group.num_views):
                pixels = torch.from_numpy(np.array(view(picture, group.transforms))).permute(2, 0, 1).contiguous()
                made.append(pixels.float().div_(255).sub_(mean).div_(std))
        return made


def pil_loader(paths: list[str], groups: list[ViewGroup], batch_size: int, batches: int, workers: int) -> DataLoader:
    """Batches of views from worker processes that live on between passes."""
    pictures = Pictures(paths, groups, batch_size * batches)
    return DataLoader(pictures, batch_size, num_workers=workers, persistent_workers=True)
