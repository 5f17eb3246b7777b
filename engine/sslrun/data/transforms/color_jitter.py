from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sslrun.data.operations import BRIGHTNESS, CONTRAST, HUE, SATURATION, Operation
from sslrun.data.transforms.base import Numbers, Transform, dali_types, per_image, within
from sslrun.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

# The operations by number: the columns of `factors` and the entries of `order`.
NAMES = ("brightness", "contrast", "saturation", "hue")

# Factors that change nothing.
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)

# DALI rounds to nearest where PIL cuts off, so results are lowered by a little less than half a level.
_CUT = 0.499

# Gray from red, green and blue.
LUMA = (0.299, 0.587, 0.114)

# Steps of PIL's hue in a turn.
_TURN = 255


class ColorJitter(Transform):
    """Changes brightness, contrast, saturation and hue by random factors, in an order drawn for each image.

    As in torchvision, a number x means factors from max(0, 1 - x) to 1 + x (for hue, rotations from -x to x of the
    color circle), and a list gives both ends. An operation whose argument is 0 is left out. Images that are not RGB can
    change in brightness and contrast alone; contrast then is about the mean of all channels.

    Args:
        brightness: strength of the change of brightness, 0 or more, or smallest and largest factor.
        contrast: strength of the change of contrast, 0 or more, or smallest and largest factor.
        saturation: strength of the change of saturation, 0 or more, or smallest and largest factor.
        hue: largest rotation of hue, 0 to 0.5 of the color circle, or smallest and largest rotation.
        p: probability of jittering an image.
    """

    num_draws = 1 + 4 + 4
    ignores_flips = True
    dali_frames = True

    def __init__(
        self,
        brightness: float | list[float] = 0.0,
        contrast: float | list[float] = 0.0,
        saturation: float | list[float] = 0.0,
        hue: float | list[float] = 0.0,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.ranges = np.array(
            [
                _range("brightness", brightness, 1.0, math.inf),
                _range("contrast", contrast, 1.0, math.inf),
                _range("saturation", saturation, 1.0, math.inf),
                _range("hue", hue, 0.0, 0.5),
            ]
        )
        self.active = [k for k in range(4) if not (self.ranges[k] == _NEUTRAL[k]).all()]
        # What the DALI graph does to every image, which needs four of them: whatever the order, it is part of this
        # sequence. The operation with the fewest operators comes most often.
        self.slots = _dali_slots([k for k in (BRIGHTNESS, SATURATION, CONTRAST, HUE) if k in self.active])

    def numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> Numbers:
        """Its numbers: `order` (N, 4), the operations in the order in which they are done (-1: none), and `factors`
        (N, 4) by operation.

        Factors are float32, since that is what PIL blends with; hue is the whole steps of 1/255 turn that PIL adds.
        """
        apply = uniforms[:, 0] < self.p
        order = np.argsort(uniforms[:, 1:5], axis=1, kind="stable")
        factors = self.ranges[:, 0] + uniforms[:, 5:9] * (self.ranges[:, 1] - self.ranges[:, 0])
        factors[:, HUE] = np.trunc(factors[:, HUE] * 255.0)
        done = apply[:, None] & np.isin(order, self.active)
        factors = np.where(apply[:, None], factors, _NEUTRAL)
        values = {"order": np.where(done, order, -1).astype(np.int32), "factors": factors.astype(np.float32)}
        return Numbers(apply, sizes, values)

    def check_channels(self, channels: int) -> None:
        of_colors = [NAMES[operation] for operation in (SATURATION, HUE) if operation in self.active]
        if channels != 3 and of_colors:
            raise UsageError(
                f"ColorJitter changes {' and '.join(of_colors)} of red, green and blue, and the images have {channels} "
                "channels: leave it at 0"
            )

    def torch_block(self, x: Tensor, numbers: Numbers) -> Tensor:
        import torch

        operations = {BRIGHTNESS: brightness, CONTRAST: contrast, SATURATION: saturation, HUE: hue}
        for slot in numbers["order"].T:
            for number in self.active:
                chosen = np.flatnonzero(slot == number)
                if len(chosen) == 0:
                    continue
                factors = per_image(numbers["factors"][chosen, number], x)
                if len(chosen) == len(x):
                    operations[number](x, factors)
                    continue
                where = torch.from_numpy(chosen).to(x.device, non_blocking=True)
                part = x[where]
                operations[number](part, factors)
                x[where] = part
        return x

    def operations(self, numbers: Numbers) -> list[Operation]:
        order = numbers["order"]
        factors = np.take_along_axis(numbers["factors"], np.maximum(order, 0), axis=1)
        return [Operation(tuple(self.active), order, factors)]

    def dali_arguments(self, numbers: Numbers) -> dict[str, np.ndarray]:
        """Of each slot. An image does its operations in the first slots that come in its order; in the others it has
        the factor that changes nothing."""
        images = np.arange(len(numbers.apply))
        done_first = np.argsort(numbers["order"] < 0, axis=1, kind="stable")
        order = np.take_along_axis(numbers["order"], done_first, axis=1)
        order = np.concatenate([order, np.full((len(order), 1), -1)], axis=1)
        place = np.zeros(len(order), dtype=np.int64)
        arguments: dict[str, np.ndarray] = {}
        for slot, operation in enumerate(self.slots):
            taken = order[images, place] == operation
            place += taken
            factor = np.where(taken, numbers["factors"][:, operation], np.float32(_NEUTRAL[operation]))
            own = _dali_hue_arguments(factor, taken) if operation == HUE else {"factor": factor}
            if operation == CONTRAST:
                own = _dali_contrast_arguments(factor)
            arguments |= {f"{name}{slot}": value for name, value in own.items()}
        return arguments

    def dali(self, image: Any, nodes: dict[str, Any]) -> Any:
        for slot, operation in enumerate(self.slots):
            if operation == BRIGHTNESS:
                image = _dali_brightness(image, nodes[f"factor{slot}"])
            elif operation == SATURATION:
                image = _dali_saturation(image, nodes[f"factor{slot}"])
            elif operation == CONTRAST:
                image = _dali_contrast(image, nodes[f"factor{slot}"], nodes[f"center{slot}"])
            else:
                image = _dali_hue(image, nodes[f"steps{slot}"], nodes[f"channels{slot}"])
        return image

    def pil(self, image: Image.Image, numbers: Numbers) -> Image.Image:
        for operation in numbers["order"].tolist():
            if operation >= 0:
                image = pil_jitter(image, operation, float(numbers["factors"][operation]))
        return image

    def describe(self, numbers: Numbers) -> dict[str, Any]:
        factors = numbers["factors"].tolist()
        turn = {"hue_degrees": factors[HUE] * 360 / 255} if HUE in self.active else {}
        order = [NAMES[operation] for operation in numbers["order"] if operation >= 0]
        return {"order": order} | {NAMES[k]: factors[k] for k in self.active if k != HUE} | turn


def _range(name: str, value: float | Sequence[float], neutral: float, most: float) -> tuple[float, float]:
    if isinstance(value, Sequence):
        return within(name, value, neutral - 1.0 if neutral else -most, most)
    if not 0 <= value <= most:
        raise UsageError(f"{name} must lie between 0 and {most}, not {value}")
    return (max(0.0, neutral - value), neutral + value) if neutral else (-value, value)


# In torch, pixels are planar floats that hold whole numbers from 0 to 255, what PIL would have stored as bytes. Every
# sum is one of whole numbers that float32 (for the mean, float64) holds exactly, so no result depends on threads, on
# the batch, on the order of summation or on fused multiply-adds. `pixels.c` holds the same expressions and gives the
# same bits. Sources: Pillow's Blend.c, Convert.c (gray and HSV) and ImageEnhance; torchvision's functional transforms.
# (N, 3, H, W) float32 is changed in place; factors are (N, 1, 1, 1).


def gray(x: Tensor) -> Tensor:
    """(N, H, W) luma: PIL's 16-bit fixed point, whose largest sum, 255 * 65536 + 32768, float32 still holds exactly."""
    import torch

    red, green, blue = x.unbind(1)
    total = torch.mul(red, 19595.0).add_(green, alpha=38470.0).add_(blue, alpha=7471.0)
    return total.add_(32768.0).mul_(2.0**-16).floor_()


def brightness(x: Tensor, factor: Tensor) -> None:
    """Blend with black."""
    x.mul_(factor).clamp_(max=255.0).floor_()


def contrast(x: Tensor, factor: Tensor) -> None:
    """Blend with the image's own mean gray, rounded to a whole level."""
    import torch

    values = gray(x) if x.shape[1] == 3 else x
    total = values.flatten(1).sum(1, dtype=torch.float64)
    mean = total.div_(values[0].numel()).add_(0.5).floor_()
    blend(x, mean.to(torch.float32).view(-1, 1, 1, 1), factor)


def saturation(x: Tensor, factor: Tensor) -> None:
    """Blend with the image's gray."""
    blend(x, gray(x)[:, None], factor)


def blend(x: Tensor, degenerate: Tensor, factor: Tensor) -> None:
    x.sub_(degenerate).mul_(factor).add_(degenerate).clamp_(0.0, 255.0).floor_()


def hue(x: Tensor, steps: Tensor) -> None:
    """Turn the hue by whole steps of 1/255 circle, by way of PIL's HSV in bytes.

    In PIL, hue = floor(255 h) with h in [0, 1), saturation = floor(255 (max - min) / max), value = max. Here h is the
    quotient of two whole numbers; PIL's float rounding differs from it on 0.3 % of all colors, by one step.
    """
    import torch

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
    # Back, in units of 1/255 sector: each channel is below the value by saturation * value * clamp(distance).
    sector = byte.mul_(6.0)
    for channel, center in ((red, 765.0), (green, 510.0), (blue, 1020.0)):
        distance = torch.sub(sector, center, out=below_blue).abs_()
        distance = distance.neg_().add_(510.0) if channel is red else distance.sub_(255.0)
        share = distance.clamp_(0.0, 255.0).mul_(saturation_times_value).mul_(1 / 65025)
        torch.sub(value, share, out=channel).add_(0.5).floor_()


# In DALI: nodes of uint8 images, HWC or, as frames, FHWC. Numbers enter as arguments of operators, which are read on
# the host: nothing but the images, and what is made of them, is on the GPU.


def _dali_slots(operations: Sequence[int]) -> list[int]:
    """A sequence that holds the operations in every order: the last of them once, the one before it twice, and so on,
    as in a b a c a b a."""
    if not operations:
        return []
    *others, last = operations
    return [*_dali_slots(others), last, *_dali_slots(others)]


def _dali_brightness(x: Any, factor: Any) -> Any:
    """Also makes bytes of floats."""
    from nvidia.dali import fn

    return fn.brightness_contrast(x, brightness=factor, brightness_shift=-_CUT / 255, dtype=dali_types().UINT8)


def _dali_saturation(x: Any, factor: Any) -> Any:
    from nvidia.dali import fn

    # Contrast about 128 and brightness that cancel each other but for a shift by -_CUT.
    scale = 1.0 - _CUT / 128
    return fn.color_twist(x, saturation=factor, brightness=scale, contrast=1.0 / scale)


def _dali_contrast_arguments(factor: np.ndarray) -> dict[str, np.ndarray]:
    """factor * (x + center . mean) is factor * x + (1 - factor) * gray of mean, where the mean stays on the GPU."""
    factor = np.maximum(factor, np.float32(1e-3))
    share = ((1.0 - factor) / factor)[:, None, None]
    return {"factor": factor, "center": (share * LUMA).astype(np.float32)}


def _dali_contrast(x: Any, factor: Any, center: Any) -> Any:
    from nvidia.dali import fn

    mean = fn.reductions.mean(x, axis_names="HW", keep_dims=True)
    return _dali_brightness(x + fn.coord_transform(mean, M=center), factor)


def _dali_hue_arguments(steps: np.ndarray, taken: np.ndarray) -> dict[str, np.ndarray]:
    """What is added to a hue, and then for each channel. The sum is wrapped to within one turn of 0."""
    # PIL cuts hues to whole steps, which takes half a step off on average.
    added = steps - 0.5 * taken
    # Red is smallest at cyan, green at magenta, blue at yellow: where hue and channel sum to 0.
    channels = _TURN / 6 * np.array([3.0, 1.0, -1.0])
    wrapped = (channels + added[:, None] + _TURN / 2) % _TURN - _TURN / 2 - added[:, None]
    return {"steps": added[:, None].astype(np.float32), "channels": (wrapped * 6 / _TURN).astype(np.float32)}


def _dali_hue(x: Any, steps: Any, channels: Any) -> Any:
    """The hue turned in HSV, of which PIL's rounding to steps of 1/255 turn is left out, but not that its bytes wrap at
    256: a hue that passes red moves by one step less.

    In units of a sixth of a turn, and from red, a hue is sign * (1 + (green + blue - red - low) / chroma), where green
    and blue decide the sign.
    """
    from nvidia.dali import fn, math

    types = dali_types()
    value = fn.reductions.max(x, axes=[-1], keep_dims=True)
    low = fn.reductions.min(x, axes=[-1], keep_dims=True)
    chroma = value - low
    distance = fn.coord_transform(x, M=[-1.0, 1.0, 1.0]) - low + chroma
    sixth = _TURN / 6
    sign = math.clamp(fn.coord_transform(x, M=[0.0, 100.0, -100.0], T=[50.0]), -sixth, sixth)
    turn = sign * distance / math.max(chroma, 1)
    turn = fn.coord_transform(turn - (turn < 0.0), M=[1.0], T=steps)
    turn = turn + (turn < 0.0)
    centered = fn.coord_transform(turn, M=[1.0 / sixth] * 3, T=channels)
    share = math.clamp(math.abs(math.abs(centered) - 3.0) - 1.0, 0.0, 1.0)
    return fn.cast(value - chroma * share, dtype=types.UINT8)


def pil_jitter(image: Image.Image, operation: int, factor: float) -> Image.Image:
    """One operation on a PIL image, as torchvision does it; `factor` as in the transform's numbers."""
    from PIL import Image, ImageEnhance

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
