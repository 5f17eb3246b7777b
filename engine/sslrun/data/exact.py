"""The exact stage: decoded images become views, with PIL's arithmetic.

A view is made image by image up to its last crop, resize or turn, then by blocks of images of one size. On the
CPU the blocks are C (`native.py`), elsewhere, and where there is no compiler, torch (`pixels.py`); both give the same
bits.
"""

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import singledispatch

import numpy as np
import torch

from sslrun.data import native, pixels
from sslrun.data.graph import Arguments, Part, numbers_of
from sslrun.data.transforms import (
    ColorJitter,
    Crop,
    GaussianBlur,
    Parameters,
    Placing,
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

# Images that one call makes: few enough to stay in the cache and to share among threads, enough to be worth a call.
_BLOCK_PIXELS = 2**17


class ExactStage:
    """Turns decoded images into views. Results depend neither on the number of threads nor on what makes them.

    Args:
        views: view groups.
        device: where the views are made and handed out.
        num_threads: threads that share the images of a batch, on the CPU.
        compiled: on the CPU, whether C may be used where a compiler is found.
    """

    def __init__(
        self, views: Sequence[ViewGroup], device: torch.device, num_threads: int = 1, compiled: bool = True
    ) -> None:
        self.views = list(views)
        self.device = device
        self.compiled = compiled and device.type == "cpu" and native.c_functions() is not None
        self._memory = _Memory(device)
        # Threads of its own: torch's number of threads belongs to a thread, and these tensors are too small for two.
        self._pool = ThreadPoolExecutor(num_threads, "sslrun-exact", initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, decoded: Sequence[torch.Tensor], arguments: Arguments) -> list[torch.Tensor]:
        """All transforms, from whole images; on the CPU only.

        Args:
            decoded: B images, (H, W, 3) uint8 RGB on the CPU, each of its own size.
            arguments: of `view_arguments` for these images.

        Returns:
            For each view group (num_views * B, 3, h, w) float32, normalized, channels-last, view-major.
        """
        images = [image.permute(2, 0, 1)[None] for image in decoded]
        views, tasks = [], []
        for g, group in enumerate(self.views):
            out = self._memory.views(group, len(images))
            program = _Program(group, f"{g}.", arguments, len(out), 0, self.compiled)
            common = images
            if program.common:
                common = list(self._pool.map(program.common_part, images, range(len(images))))
            for rows in _blocks(0, len(out), group.size):
                own = [common[row % len(images)] for row in range(rows.start, rows.stop)]
                tasks.append(self._pool.submit(program.from_images, own, rows, out))
            views.append(out)
        for task in tasks:
            task.result()
        return views

    def finish(self, crops: Sequence[torch.Tensor], arguments: Arguments, part: Part) -> list[torch.Tensor]:
        """What is left after the graph has done its part.

        Args:
            crops: for each view, group by group, (B, h, w, 3) uint8 on the stage's device.
            arguments: of `view_arguments` for these images.
            part: what the graph has done.

        Returns:
            As `__call__`.
        """
        views, tasks, remaining = [], [], iter(crops)
        for g, group in enumerate(self.views):
            done = group.num_geometric if part == "geometry" else len(group.steps)
            own = [next(remaining).permute(0, 3, 1, 2) for _ in range(group.num_views)]
            out = self._memory.views(group, len(own[0]))
            program = _Program(group, f"{g}.", arguments, len(out), done, self.compiled)
            for view, crop in enumerate(own):
                first = view * len(crop)
                if self.device.type != "cpu":  # all at once, on the caller's stream
                    program.from_crops(crop, slice(first, first + len(crop)), out)
                    continue
                for rows in _blocks(first, len(crop), group.size):
                    block = crop[rows.start - first : rows.stop - first]
                    tasks.append(self._pool.submit(program.from_crops, block, rows, out))
            views.append(out)
        for task in tasks:
            task.result()
        return views


class _Program:
    """The steps of one view group with the arguments of one batch.

    Args:
        group: the view group.
        prefix: of its arguments' names.
        arguments: of `view_arguments`.
        rows: views of the group in this batch.
        done: how many of the first steps have been done already.
        compiled: whether C may make the blocks.
    """

    def __init__(
        self, group: ViewGroup, prefix: str, arguments: Arguments, rows: int, done: int, compiled: bool
    ) -> None:
        steps = [(transform, numbers_of(arguments, prefix + step)) for step, transform in group.steps[done:]]
        placing = [i for i, (transform, _) in enumerate(steps) if isinstance(transform, Placing)]
        assert not (placing and done), "the graph leaves no crop, resize or turn to the stage"
        split = placing[-1] + 1 if placing else 0
        common = 0 if done else min(group.num_common, split)
        self.common, self.single, self.block = steps[:common], steps[common:split], steps[split:]
        self.size = group.size
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (group.normalize.mean, group.normalize.std))
        self.scale, self.offset = (1 / (255 * std)).to(torch.float32), (-mean / std).to(torch.float32)
        self.told = native.instructions(self.block, rows) if compiled else None

    def common_part(self, image: torch.Tensor, row: int) -> torch.Tensor:
        """An image (1, 3, H, W) uint8 after what its views, of which `row` is the first, have in common."""
        return _applied(self.common, image, row)

    def from_images(self, images: Sequence[torch.Tensor], rows: slice, out: torch.Tensor) -> None:
        """Makes `out[rows]` from one image each, (1, 3, H, W) uint8, of `common_part`."""
        crops = torch.empty((len(images), *self.size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        for i, image in enumerate(images):
            crops[i : i + 1] = _applied(self.single, image, rows.start + i)
        self.from_crops(crops, rows, out)

    def from_crops(self, crops: torch.Tensor, rows: slice, out: torch.Tensor) -> None:
        """Makes `out[rows]` from images that have their size: (N, 3, h, w) uint8, contiguous as channels-last."""
        if self.told is not None:
            native.run(crops, self.told, rows, self.scale, self.offset, out[rows])
            return
        flips = [numbers["apply"][rows] for t, numbers in self.block if isinstance(t, RandomHorizontalFlip)]
        if flips:
            # No color operation and no blur sees the difference, so all flips are done at once, on bytes.
            crops = _flip(crops, np.logical_xor.reduce(flips))
        x = crops.to(torch.float32, memory_format=torch.contiguous_format)
        for transform, numbers in self.block:
            if not isinstance(transform, RandomHorizontalFlip):
                change(transform, x, {name: values[rows] for name, values in numbers.items()})
        scale, offset = (v.view(1, 3, 1, 1).to(x.device) for v in (self.scale, self.offset))
        out[rows] = x.mul_(scale).add_(offset)


def _applied(steps: Sequence[tuple[Transform, Parameters]], image: torch.Tensor, row: int) -> torch.Tensor:
    """One image, (1, 3, H, W) uint8, after some steps with the numbers of view `row`."""
    for transform, numbers in steps:
        if not numbers["apply"][row]:
            continue
        if isinstance(transform, Resample):
            box, size = numbers["box"][row].tolist(), numbers["size"][row].tolist()
            image = pixels.resample(image, box, size, transform.interpolation)
        elif isinstance(transform, Crop):
            image = pixels.center_crop(image, numbers["start"][row].tolist(), numbers["size"][row].tolist())
        elif isinstance(transform, RandomRotation):
            image = pixels.rotate(image, numbers["affine"][row].tolist())
        elif isinstance(transform, RandomHorizontalFlip):
            image = image.flip(-1)
        else:
            x = image.to(torch.float32, memory_format=torch.contiguous_format)
            change(transform, x, {name: values[row : row + 1] for name, values in numbers.items()})
            image = x.to(torch.uint8)
    return image


@singledispatch
def change(transform: Transform, x: torch.Tensor, numbers: Parameters) -> None:
    """What a transform does to pixels; a transform of one's own registers its function here.

    Args:
        transform: the transform.
        x: (N, 3, H, W) float32, whole numbers from 0 to 255; changed in place.
        numbers: the transform's parameters of these N images.
    """
    raise UsageError(f'{type(transform).__name__} has no exact form; use data.augment = "dali"')


@change.register
def _(transform: ColorJitter, x: torch.Tensor, numbers: Parameters) -> None:
    for slot in numbers["order"].T:
        for number in transform.active:
            _where(slot == number, x, _JITTER[number], numbers["factors"][:, number])


@change.register
def _(transform: RandomGrayscale, x: torch.Tensor, numbers: Parameters) -> None:
    _where(numbers["apply"], x, pixels.grayscale)


@change.register
def _(transform: Solarization, x: torch.Tensor, numbers: Parameters) -> None:
    _where(numbers["apply"], x, lambda part: pixels.solarize(part, transform.threshold))


@change.register
def _(transform: GaussianBlur, x: torch.Tensor, numbers: Parameters) -> None:
    _where(numbers["apply"], x, pixels.blur, *pixels.blur_taps(numbers["sigma"]))


_JITTER = {BRIGHTNESS: pixels.brightness, CONTRAST: pixels.contrast, SATURATION: pixels.saturation, HUE: pixels.hue}


def _where(chosen: np.ndarray, x: torch.Tensor, operation: Callable[..., None], *numbers: np.ndarray) -> None:
    """Does an operation to the chosen ones of N images, each with its own numbers, (N,) or (N, k)."""
    indices = np.flatnonzero(chosen)
    if len(indices) == 0:
        return
    own = [
        torch.from_numpy(values[indices]).to(x.device, non_blocking=True)[..., None, None, None] for values in numbers
    ]
    if len(indices) == len(x):
        operation(x, *own)
        return
    where = torch.from_numpy(indices).to(x.device, non_blocking=True)
    part = x[where]
    operation(part, *own)
    x[where] = part


def _flip(crops: torch.Tensor, chosen: np.ndarray) -> torch.Tensor:
    mirror = torch.from_numpy(chosen).to(crops.device, non_blocking=True).view(-1, 1, 1, 1)
    return torch.where(mirror, crops.flip(-1), crops)


def _blocks(first: int, count: int, size: tuple[int, int]) -> Iterator[slice]:
    length = max(1, _BLOCK_PIXELS // (size[0] * size[1]))
    for start in range(first, first + count, length):
        yield slice(start, min(start + length, first + count))


class _Memory:
    """Memory for views, used again once nothing refers to it: new pages for every batch would cost a fifth of all."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)

    def views(self, group: ViewGroup, batch: int) -> torch.Tensor:
        """(num_views * batch, 3, h, w) float32 as channels-last, with anything in it."""
        shape = (group.num_views * batch, *group.size, 3)
        if self._device.type != "cpu":
            return torch.empty(shape, device=self._device).permute(0, 3, 1, 2)
        free = self._free[math.prod(shape)]
        memory = free.pop() if free else np.empty(math.prod(shape), dtype=np.float32)
        lent = memory.view()  # lives as long as the storage of the tensor, whoever shares that
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent).view(shape).permute(0, 3, 1, 2)
