"""The exact stage: the transforms of a recipe in plain torch, following PIL's arithmetic to the rounding.

Between two operations pixels are planar float tensors, (N, 3, H, W), that hold whole numbers from 0 to 255: what PIL would
have stored as bytes, without the cost of converting back and forth. Every sum is one of whole numbers that float32 (or,
for the mean, float64) holds exactly, so no result depends on threads, on the batch, on the order of summation or on
fused multiply-adds. Operations work in place. Factors come one for each of the N pictures, as (N, 1, 1, 1).

Sources: Pillow's Blend.c, Convert.c (grey and HSV), Enhance; torchvision's functional transforms for what is drawn.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import singledispatch

import numpy as np
import torch
import torch.nn.functional as F

from sslrun.data.graph import Arguments, Part
from sslrun.data.transforms import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    Parameters,
    RandomGrayscale,
    RandomHorizontalFlip,
    Resample,
    Solarization,
    Transform,
    ViewGroup,
)
from sslrun.errors import UsageError

# Colour operations run on blocks of several small pictures, to spare calls, or on one large one, to stay in the cache.
_BLOCK_PIXELS = 2**17
_LARGE_PICTURE_PIXELS = 2**14

# The Gaussian's tails are cut here, in standard deviations: beyond it a tap is less than half a unit of its fixed point.
_BLUR_REACH = 4.0


def grey(x: torch.Tensor) -> torch.Tensor:
    """(N, H, W) luma: PIL's 16-bit fixed point, whose largest sum, 255 * 65536 + 32768, float32 still holds exactly."""
    red, green, blue = x.unbind(1)
    total = torch.mul(red, 19595.0).add_(green, alpha=38470.0).add_(blue, alpha=7471.0)
    return total.add_(32768.0).mul_(2.0**-16).floor_()


def brightness(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Blend with black."""
    x.mul_(factor).clamp_(max=255.0).floor_()


def contrast(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Blend with the picture's own mean grey, rounded to a whole level."""
    _, _, height, width = x.shape
    mean = grey(x).sum((1, 2), dtype=torch.float64).div_(height * width).add_(0.5).floor_()
    _blend(x, mean.to(torch.float32).view(-1, 1, 1, 1), factor)


def saturation(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Blend with the picture's grey."""
    _blend(x, grey(x)[:, None], factor)


def _blend(x: torch.Tensor, degenerate: torch.Tensor, factor: torch.Tensor) -> None:
    x.sub_(degenerate).mul_(factor).add_(degenerate).clamp_(0.0, 255.0).floor_()


def hue(x: torch.Tensor, steps: torch.Tensor) -> None:
    """Turn the hue by whole steps of 1/255 circle, by way of PIL's HSV in bytes.

    In PIL, hue = floor(255 h) with h in [0, 1), saturation = floor(255 (max - min) / max), value = max. Here h is the
    quotient of two whole numbers; PIL's float rounding differs from it on 0.3 % of all colours, by one step.
    """
    red, green, blue = x.unbind(1)
    value = torch.maximum(red, green)
    low = torch.minimum(red, green)
    torch.maximum(value, blue, out=value)
    torch.minimum(low, blue, out=low)
    chroma = torch.sub(value, low, out=low)
    below_red, below_green, below_blue = value - red, value - green, value - blue
    saturation_times_value = (chroma * 255.0).div_(value.clamp(min=1.0)).floor_().mul_(value)
    # 6 h chroma: blue - green below where red is the largest, 2 chroma + red - blue where green is, else 4 chroma + ...
    # Written without comparisons, since a mask costs more than the arithmetic: clamped to 1, "below" is a mask already.
    total = (below_red + below_green).add_(below_blue).add_(chroma, alpha=2.0)
    turn = torch.sub(total, below_red, alpha=3.0).mul_(below_green.clamp(max=1.0)).add_(total)
    turn.sub_(below_blue, alpha=3.0).mul_(below_red.clamp_(max=1.0)).add_(below_blue).sub_(below_green)
    negative = turn.clamp(-1.0, 0.0)
    byte = turn.mul_(42.5).div_(chroma.clamp_(min=1.0)).floor_().sub_(negative, alpha=255.0).add_(steps[:, 0])
    byte.sub_(torch.mul(byte, 1 / 256, out=negative).floor_(), alpha=256.0)
    # Back: in units of 1/255 sector, a channel lies below the value by saturation * value * clamp(distance - 255, 0, 255).
    sector = byte.mul_(6.0)
    for channel, centre in ((red, 765.0), (green, 510.0), (blue, 1020.0)):
        distance = torch.sub(sector, centre, out=below_blue).abs_()
        distance = distance.neg_().add_(510.0) if channel is red else distance.sub_(255.0)
        share = distance.clamp_(0.0, 255.0).mul_(saturation_times_value).mul_(1 / 65025)
        torch.sub(value, share, out=channel).add_(0.5).floor_()


def grayscale(x: torch.Tensor) -> None:
    """Every channel the grey."""
    x.copy_(grey(x)[:, None])


def solarize(x: torch.Tensor, threshold: int) -> None:
    """255 - x where x is at the threshold or above."""
    inverted = (x - (threshold - 1.0)).clamp_(0.0, 1.0)
    x.add_(inverted.mul_(torch.mul(x, -2.0).add_(255.0)))


def blur_taps(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian weights in whole numbers, centre first, one side only.

    Args:
        sigma: (N,) pixels.

    Returns:
        (N, taps) for the horizontal pass, which sum to 2**16 with both sides, and for the vertical pass, to 2**12: with
        pixels of 8 bits, and of 12 after the first pass, every sum stays below 2**24. A picture's weights do not depend
        on its neighbours; beyond its own reach they are zero.
    """
    widths = sigma.astype(np.float64)[:, None]
    reach = np.ceil(_BLUR_REACH * widths)
    distance = np.arange(int(reach.max()) + 1)
    weights = np.exp(-0.5 * (distance / widths) ** 2) * (distance <= reach)
    weights /= 2.0 * weights.sum(axis=1, keepdims=True) - weights[:, :1]

    def whole(total: int) -> np.ndarray:
        taps = np.rint(weights * total)
        taps[:, 0] = total - 2.0 * taps[:, 1:].sum(axis=1)
        return taps.astype(np.float32)

    return whole(2**16), whole(2**12)


def blur(x: torch.Tensor, horizontal: torch.Tensor, vertical: torch.Tensor) -> None:
    """Separable blur with reflected borders, rounded to 1/16 level between the passes and to a level at the end.

    Args:
        x: (N, 3, H, W).
        horizontal: (N, taps, 1, 1, 1) of `blur_taps`; no more taps than the picture has rows or columns.
        vertical: the same.
    """
    _, _, height, width = x.shape
    reach = horizontal.shape[1] - 1
    padded = F.pad(x, (reach, reach, reach, reach), mode="reflect")
    rows = _filter(padded, horizontal, dim=3, length=width).mul_(2.0**-12).add_(0.5).floor_()
    torch.mul(_filter(rows, vertical, dim=2, length=height), 2.0**-16, out=x).add_(0.5).floor_()


def _filter(padded: torch.Tensor, taps: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    centre, *sides = taps.unbind(1)
    reach = len(sides)
    total = padded.narrow(dim, reach, length) * centre
    pair = torch.empty_like(total)
    for distance, weight in enumerate(sides, start=1):
        torch.add(padded.narrow(dim, reach - distance, length), padded.narrow(dim, reach + distance, length), out=pair)
        total.addcmul_(pair, weight)
    return total


def resample(picture: torch.Tensor, box: Sequence[int], size: Sequence[int], interpolation: str) -> torch.Tensor:
    """A box of one picture in a new size, filtered as PIL does (the filter sees only the box).

    Args:
        picture: (1, 3, H, W) uint8, of any strides.
        box: top, left, height, width.
        size: height and width.
        interpolation: "bilinear" or "bicubic".
    """
    top, left, height, width = box
    crop = picture[..., top : top + height, left : left + width]
    if (height, width) == tuple(size):
        return crop
    return F.interpolate(crop, tuple(size), mode=interpolation, align_corners=False, antialias=True)


def center_crop(picture: torch.Tensor, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """Rows and columns from `start` on; black where they lie outside of the picture."""
    (top, left), (height, width) = start, size
    _, _, old_height, old_width = picture.shape
    return F.pad(picture, (-left, left + width - old_width, -top, top + height - old_height))


class ExactStage:
    """Turns decoded pictures into views. Has no state but its threads; results do not depend on their number.

    Args:
        views: view groups.
        device: where the views are made and handed out.
        num_threads: threads that share the pictures of a batch, on the CPU.
    """

    def __init__(self, views: Sequence[ViewGroup], device: torch.device, num_threads: int = 1) -> None:
        self.views = list(views)
        self.device = device
        # Threads of its own, since torch's number of threads belongs to a thread, and these tensors are too small for two.
        self._pool = ThreadPoolExecutor(num_threads, "sslrun-exact", initializer=torch.set_num_threads, initargs=(1,))

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()

    def __call__(self, decoded: Sequence[torch.Tensor], arguments: Arguments) -> list[torch.Tensor]:
        """All transforms, from whole pictures.

        Args:
            decoded: B pictures, (H, W, 3) uint8 RGB on the CPU, each of its own size.
            arguments: of `view_arguments` for these pictures.

        Returns:
            For each view group (num_views * B, 3, h, w) float32, normalised, channels-last, view-major.
        """
        pictures = [picture.permute(2, 0, 1)[None] for picture in decoded]
        results, pending = [], []
        for g, group in enumerate(self.views):
            program = _Program(group, f"{g}.", arguments)
            out = _empty_views(group, len(pictures), torch.device("cpu"))
            for rows in _blocks(len(out), group.size):
                sources = [pictures[row % len(pictures)] for row in range(rows.start, rows.stop)]
                pending.append(self._pool.submit(program.run, sources, rows, out))
            results.append(out)
        for task in pending:
            task.result()
        return [out.to(self.device, non_blocking=True) for out in results]

    def finish(self, crops: Sequence[torch.Tensor], arguments: Arguments, part: Part) -> list[torch.Tensor]:
        """What is left after the graph has done its part.

        Args:
            crops: for each view, group by group, (B, h, w, 3) uint8 on any device.
            arguments: of `view_arguments` for these pictures.
            part: what the graph has done.

        Returns:
            As `__call__`, on the stage's device.
        """
        results = []
        remaining = iter(crops)
        for g, group in enumerate(self.views):
            program = _Program(group, f"{g}.", arguments, done=part)
            own = [next(remaining).to(self.device, non_blocking=True) for _ in range(group.num_views)]
            batch = len(own[0])
            out = _empty_views(group, batch, self.device)
            for view, crop in enumerate(own):
                program.run_block(crop.permute(0, 3, 1, 2), slice(view * batch, (view + 1) * batch), out)
            results.append(out)
        return results


class _Program:
    """The steps of one view group with the arguments of one batch.

    First picture by picture up to the last change of size, then by blocks of pictures of that size.
    """

    def __init__(self, group: ViewGroup, prefix: str, arguments: Arguments, done: Part | None = None) -> None:
        steps = group.steps[{None: 0, "geometry": group.num_geometric, "all": len(group.steps)}[done] :]
        resizing = [i for i, (_, transform) in enumerate(steps) if isinstance(transform, Resample | CenterCrop)]
        assert not (resizing and done), "the graph leaves no change of size to the stage"
        split = resizing[-1] + 1 if resizing else 0
        self.single, self.block = steps[:split], steps[split:]
        self.numbers = {
            step: {
                name.removeprefix(prefix + step): values
                for name, values in arguments.items()
                if name.startswith(prefix + step)
            }
            for step, _ in steps
        }
        mean = torch.tensor(group.normalize.mean, dtype=torch.float64).view(1, 3, 1, 1)
        std = torch.tensor(group.normalize.std, dtype=torch.float64).view(1, 3, 1, 1)
        self.scale, self.offset = (1 / (255 * std)).to(torch.float32), (-mean / std).to(torch.float32)

    def run(self, pictures: Sequence[torch.Tensor], rows: slice, out: torch.Tensor) -> None:
        """Makes `out[rows]` from one picture each, (1, 3, H, W) uint8."""
        made = [self._single(picture, slice(rows.start + i, rows.start + i + 1)) for i, picture in enumerate(pictures)]
        self.run_block(torch.cat(made) if len(made) > 1 else made[0], rows, out)

    def _single(self, picture: torch.Tensor, row: slice) -> torch.Tensor:
        for step, transform in self.single:
            numbers = {name: values[row] for name, values in self.numbers[step].items()}
            if not numbers["apply"][0]:
                continue
            if isinstance(transform, Resample):
                picture = resample(
                    picture, numbers["box"][0].tolist(), numbers["size"][0].tolist(), transform.interpolation
                )
            elif isinstance(transform, CenterCrop):
                picture = center_crop(picture, numbers["start"][0].tolist(), numbers["size"][0].tolist())
            elif isinstance(transform, RandomHorizontalFlip):
                picture = picture.flip(-1)
            else:
                x = picture.to(torch.float32, memory_format=torch.contiguous_format)
                change(transform, x, numbers)
                picture = x.to(torch.uint8)
        return picture

    def run_block(self, pixels: torch.Tensor, rows: slice, out: torch.Tensor) -> None:
        """Colours, flips and normalises (N, 3, h, w) uint8 into `out[rows]`."""
        flips = [self.numbers[step]["apply"][rows] for step, t in self.block if isinstance(t, RandomHorizontalFlip)]
        if flips:
            # No operation on colours and no blur sees a difference, so all flips are done at once, on bytes.
            pixels = _flip(pixels, np.logical_xor.reduce(flips))
        x = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        for step, transform in self.block:
            if not isinstance(transform, RandomHorizontalFlip):
                change(transform, x, {name: values[rows] for name, values in self.numbers[step].items()})
        out[rows] = x.mul_(self.scale.to(x.device)).add_(self.offset.to(x.device))


@singledispatch
def change(transform: Transform, x: torch.Tensor, numbers: Parameters) -> None:
    """What a transform does to pixels; a transform of one's own registers its function here.

    Args:
        transform: the transform.
        x: (N, 3, H, W) float32, whole numbers from 0 to 255; changed in place.
        numbers: the transform's parameters of these N pictures.
    """
    raise UsageError(f'{type(transform).__name__} has no exact form; use data.augment = "dali"')


@change.register
def _(transform: ColorJitter, x: torch.Tensor, numbers: Parameters) -> None:
    for slot in numbers["order"].T:
        for number in transform.active:
            _where(slot == number, x, _JITTER[number], numbers["factors"][:, number])


@change.register
def _(transform: RandomGrayscale, x: torch.Tensor, numbers: Parameters) -> None:
    _where(numbers["apply"], x, grayscale)


@change.register
def _(transform: Solarization, x: torch.Tensor, numbers: Parameters) -> None:
    _where(numbers["apply"], x, lambda part: solarize(part, transform.threshold))


@change.register
def _(transform: GaussianBlur, x: torch.Tensor, numbers: Parameters) -> None:
    if x.device.type == "cpu":  # one by one, each with no more taps than it needs
        for i in np.flatnonzero(numbers["apply"]):
            blur(
                x[i : i + 1],
                *(torch.from_numpy(taps)[..., None, None, None] for taps in blur_taps(numbers["sigma"][i : i + 1])),
            )
    else:
        horizontal, vertical = blur_taps(numbers["sigma"])
        _where(numbers["apply"], x, blur, horizontal, vertical)


_JITTER = {BRIGHTNESS: brightness, CONTRAST: contrast, SATURATION: saturation, HUE: hue}


def _where(chosen: np.ndarray, x: torch.Tensor, operation: Callable[..., None], *numbers: np.ndarray) -> None:
    """Does an operation to the chosen ones of N pictures, each with its own numbers, (N,) or (N, k)."""
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


def _flip(pixels: torch.Tensor, chosen: np.ndarray) -> torch.Tensor:
    if chosen.all():
        return pixels.flip(-1)
    if not chosen.any():
        return pixels
    mirror = torch.from_numpy(chosen).to(pixels.device, non_blocking=True).view(-1, 1, 1, 1)
    return torch.where(mirror, pixels.flip(-1), pixels)


def _blocks(count: int, size: tuple[int, int]) -> Iterator[slice]:
    pixels = size[0] * size[1]
    length = 1 if pixels >= _LARGE_PICTURE_PIXELS else max(1, _BLOCK_PIXELS // pixels)
    for start in range(0, count, length):
        yield slice(start, min(start + length, count))


def _empty_views(group: ViewGroup, batch: int, device: torch.device) -> torch.Tensor:
    shape = (group.num_views * batch, *group.size, 3)
    return torch.empty(shape, dtype=torch.float32, device=device).permute(0, 3, 1, 2)
