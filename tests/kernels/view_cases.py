"""Images and recipes of the view kernels' tests, made by the kernels and by the torch forms of exact mode."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslkernels.views import Table, write_views
from sslrun.data import operations
from sslrun.data.exact import ExactStage, table_of
from sslrun.data.graph import Arguments, view_arguments
from sslrun.data.transforms import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    Normalize,
    RandomGrayscale,
    RandomHorizontalFlip,
    Solarization,
    Transform,
)
from sslrun.data.views import ViewGroup

BYTES = Normalize((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # 1 x + 0: what is there before normalization
KINDS = ["noise", "smooth", "extreme", "gray"]


def pixels(kind: str, count: int, height: int, width: int) -> Tensor:
    """Images (N, h, w, 3) uint8."""
    random = np.random.default_rng(0)
    if kind == "noise":
        images = random.integers(0, 256, (count, height, width, 3))
    elif kind == "extreme":
        images = random.choice([0, 1, 127, 128, 254, 255], (count, height, width, 3))
    elif kind == "gray":
        images = np.repeat(random.integers(0, 256, (count, height, width, 1)), 3, axis=3)
    else:
        y, x, channel = np.mgrid[:height, :width, :3]
        waves = [127 + 120 * np.sin(y / (3 + i) + channel) * np.cos(x / (5 + channel)) for i in range(count)]
        images = np.clip(waves + random.integers(-5, 6, (count, height, width, 3)), 0, 255)
    return torch.from_numpy(images.astype(np.uint8))


def moco(p: float = 0.8, strength: float = 0.4, hue: float = 0.1) -> list[Transform]:
    """The steps of MoCo v2, or of SwAV with 0.8 and 0.2: the flip comes last."""
    jitter = ColorJitter(strength, strength, strength, hue, p=p)
    return [jitter, RandomGrayscale(0.2), GaussianBlur(p=0.5), RandomHorizontalFlip()]


def byol(blurred: float = 0.6, solarized: float = 0.6) -> list[Transform]:
    """The steps of BYOL: the flip comes first, and something follows the blur."""
    jitter = ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8)
    return [RandomHorizontalFlip(), jitter, RandomGrayscale(0.2), GaussianBlur(p=blurred), Solarization(p=solarized)]


def group_of(steps: list[Transform], crops: Tensor, normalize: Normalize | None = None) -> ViewGroup:
    """One view of images that have its size already; its first step does nothing."""
    return ViewGroup(1, [CenterCrop(list(crops.shape[1:3])), *steps, normalize or BYTES])


def arguments_of(group: ViewGroup, count: int, seed: int = 0, **changes: np.ndarray) -> Arguments:
    """Arguments of `count` images; `changes` to the values of the second step."""
    arguments = view_arguments([group], seed, 0, np.arange(count), np.full((count, 2), group.size))
    if changes:
        arguments[0][1].values.update(changes)
    return arguments


def in_torch(group: ViewGroup, crops: Tensor, arguments: Arguments) -> Tensor:
    """The views (N, 3, h, w) float32 by the torch forms."""
    stage = ExactStage([group], torch.device("cpu"), dali_steps=[1], compiled=False)
    return stage([[crops]], arguments)[0]


def tables(group: ViewGroup, arguments: Arguments) -> list[Table]:
    """The tables of each pass, as the exact stage makes them."""
    named = []
    for step, own in zip(group.steps[1:], arguments[0][1:], strict=True):
        assert step.operations is not None
        named += step.operations(own)
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (group.normalize.mean, group.normalize.std))
    scales = torch.stack([1 / (255 * std), -mean / std]).float()
    programs = [operations.program(own, len(arguments[0][0].apply)) for own in operations.passes(named)]
    return [table_of(own, scales if own is programs[-1] else None) for own in programs]


def by_kernel(
    passes: list[Table],
    crops: Tensor,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tensors: int = 1,
) -> Tensor:
    """The views by `write_views`; crops in several tensors."""
    given: list[Tensor] = list(crops.to(device).chunk(tensors))
    for table in passes:
        kind = torch.uint8 if table.scales is None else dtype
        views = torch.empty(crops.shape, dtype=kind, device=device)
        write_views(views.permute(0, 3, 1, 2), given, table)
        given = [views]
    return views.permute(0, 3, 1, 2)


def check(
    steps: list[Transform],
    crops: Tensor,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tensors: int = 1,
    **options: Any,
) -> None:
    """Bytes and normalized values have the bits of the torch forms, rounded once to `dtype`."""
    for normalize in (BYTES, Normalize()):
        group = group_of(steps, crops, normalize)
        arguments = arguments_of(group, len(crops), **options)
        expected = in_torch(group, crops, arguments).to(dtype)
        views = by_kernel(tables(group, arguments), crops, device, dtype, tensors)
        assert views.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(views.cpu(), expected), (views.cpu().float() - expected.float()).abs().max()
