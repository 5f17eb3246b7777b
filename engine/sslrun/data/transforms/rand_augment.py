from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sslrun.data.transforms.affine import affine
from sslrun.data.transforms.base import Numbers, Transform, per_image
from sslrun.data.transforms.color_jitter import blend, brightness, contrast, saturation
from sslrun.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

# What is drawn from, by number; those from ROTATE on move pixels.
OPERATIONS = (
    "auto contrast", "equalize", "invert", "posterize", "solarize", "solarize add", "color", "contrast", "brightness",
    "sharpness", "rotate", "shear x", "shear y", "translate x", "translate y",
)  # fmt: skip
(AUTO_CONTRAST, EQUALIZE, INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD, COLOR, CONTRAST, BRIGHTNESS, SHARPNESS, ROTATE,
 SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y) = range(15)  # fmt: skip

_MOST = 10.0  # magnitude
_DRAWS = 5  # of each operation: which, whether, two for a normal number, the sign


class RandAugment(Transform):
    """Applies random operations of 15 to an image: geometric ones, and ones that change its colors.

    Cubuk et al. 2020 (arXiv 1909.13719), in the form of the fine-tuning of MAE and BEiT (timm's name for it is
    "rand-m9-mstd0.5-inc1"): every operation grows stronger with the magnitude; rotations, shears and translations are
    bicubic.

    Args:
        num_ops: number of operations that are drawn for an image, with replacement.
        magnitude: mean strength of the operations, 0 to 10.
        magnitude_std: standard deviation of the strength, which is drawn for each operation and cut at 0 and 10.
        prob: probability that a drawn operation is applied.
        fill: red, green and blue, 0 to 255, of what a rotation, shear or translation leaves empty.
        p: probability of augmenting an image.
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: float = 9.0,
        magnitude_std: float = 0.5,
        prob: float = 0.5,
        fill: tuple[int, int, int] = (124, 116, 104),
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        if num_ops < 1:
            raise UsageError(f"num_ops must be at least 1, not {num_ops}")
        if not 0 <= magnitude <= _MOST:
            raise UsageError(f"magnitude must lie between 0 and {_MOST:g}, not {magnitude}")
        if not 0 <= magnitude_std < math.inf:
            raise UsageError(f"magnitude_std must be 0 or more, not {magnitude_std}")
        if not 0 <= prob <= 1:
            raise UsageError(f"prob must lie between 0 and 1, not {prob}")
        if not all(0 <= level <= 255 for level in fill):
            raise UsageError(f"fill must be three numbers from 0 to 255, not {list(fill)}")
        self.num_ops, self.magnitude, self.magnitude_std, self.prob = num_ops, magnitude, magnitude_std, prob
        self.fill = (fill[0], fill[1], fill[2])
        self.num_draws = 1 + _DRAWS * num_ops

    def check_channels(self, channels: int) -> None:
        if channels != 3:
            raise UsageError(f"RandAugment takes red, green and blue, and the images have {channels} channels")

    def numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> Numbers:
        """Its numbers, (N, num_ops): `operation` (-1: none), and its `argument`: bits, threshold, amount, factor,
        degrees counter-clockwise, slope, or share of the side."""
        apply = uniforms[:, 0] < self.p
        draws = uniforms[:, 1:].reshape(len(uniforms), self.num_ops, _DRAWS)
        chosen = np.floor(draws[..., 0] * len(OPERATIONS)).astype(np.int32)
        normal = np.sqrt(-2 * np.log1p(-draws[..., 2])) * np.cos(2 * np.pi * draws[..., 3])
        share = np.clip(self.magnitude + self.magnitude_std * normal, 0, _MOST) / _MOST
        signed = np.where(draws[..., 4] < 0.5, -share, share)
        zero, factor = np.zeros_like(share), np.maximum(0.1, 1 + 0.9 * signed)
        arguments = [
            zero, zero, zero, np.maximum(1, 4 - np.floor(4 * share)), 256 - np.floor(256 * share),
            np.floor(110 * share), factor, factor, factor, factor,
            30 * signed, 0.3 * signed, 0.3 * signed, 0.45 * signed, 0.45 * signed,
        ]  # fmt: skip
        argument = np.take_along_axis(np.stack(arguments), chosen[None].astype(np.int64), axis=0)[0]
        done = apply[:, None] & (draws[..., 1] < self.prob)
        return Numbers(apply, sizes, {"operation": np.where(done, chosen, -1), "argument": argument})

    def torch_image(self, image: Tensor, numbers: Numbers) -> Tensor:
        for operation, argument in zip(numbers["operation"].tolist(), numbers["argument"].tolist(), strict=True):
            if operation >= ROTATE:
                height, width = image.shape[-2:]
                image = affine(image, _matrix(operation, argument, height, width), self.fill)
            elif operation >= 0:
                image = _recolored(image, operation, argument)
        return image

    def pil(self, image: Image.Image, numbers: Numbers) -> Image.Image:
        for operation, argument in zip(numbers["operation"].tolist(), numbers["argument"].tolist(), strict=True):
            if operation >= 0:
                image = _pil(image, operation, argument, self.fill)
        return image

    def describe(self, numbers: Numbers) -> dict[str, Any]:
        pairs = zip(numbers["operation"].tolist(), numbers["argument"].tolist(), strict=True)
        done = [(OPERATIONS[operation], argument) for operation, argument in pairs if operation >= 0]
        return {"operations": [name for name, _ in done], "arguments": [argument for _, argument in done]}


def _matrix(operation: int, argument: float, height: int, width: int) -> tuple[float, ...]:
    """a to f: the pixel at column x and row y comes from column a x + b y + c and row d x + e y + f."""
    if operation == ROTATE:
        turn = math.radians(argument)
        cosine, sine = round(math.cos(turn), 15), round(math.sin(turn), 15)  # as in PIL
        x, y = width / 2, height / 2
        return cosine, -sine, -cosine * x + sine * y + x, sine, cosine, -sine * x - cosine * y + y
    b, c, d, f = (argument if operation == each else 0.0 for each in (SHEAR_X, TRANSLATE_X, SHEAR_Y, TRANSLATE_Y))
    return 1.0, b, c * width, d, 1.0, f * height


def _recolored(image: Tensor, operation: int, argument: float) -> Tensor:
    """An operation that moves no pixel, on (1, 3, H, W) uint8; what PIL's ImageOps and ImageEnhance do."""
    import torch

    if operation == INVERT:
        return 255 - image
    if operation == POSTERIZE:
        return image & (256 - 2 ** (8 - int(argument)))
    if operation == SOLARIZE:
        return torch.where(image < int(argument), image, 255 - image)
    if operation == SOLARIZE_ADD:
        return torch.where(image < 128, image.clamp(max=255 - int(argument)) + int(argument), image)
    if operation in (AUTO_CONTRAST, EQUALIZE):
        table = _stretching(image) if operation == AUTO_CONTRAST else _equalizing(image)
        return torch.stack([table[channel][plane.long()] for channel, plane in enumerate(image[0])]).unsqueeze(0)
    x = image.to(torch.float32, memory_format=torch.contiguous_format)
    factor = per_image(np.array([argument], dtype=np.float32), x)
    if operation == SHARPNESS:
        blend(x, _smoothed(x), factor)
    else:
        {COLOR: saturation, CONTRAST: contrast, BRIGHTNESS: brightness}[operation](x, factor)
    return x.to(torch.uint8)


def _stretching(image: Tensor) -> Tensor:
    """(3, 256) uint8: each channel's values from 0 to 255."""
    import torch

    planes = image[0].flatten(1).double()
    low, high = planes.amin(dim=1, keepdim=True), planes.amax(dim=1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64, device=image.device).expand(3, -1)
    scale = torch.full_like(high, 255.0) / (high - low)  # 255.0 / x is a product with 1 / x in torch
    table = (values * scale + -low * scale).trunc().clamp(0, 255)
    return torch.where(high > low, table, values).to(torch.uint8)


def _equalizing(image: Tensor) -> Tensor:
    """(3, 256) uint8: tables after which each channel's values are about equally frequent."""
    import torch

    tables = []
    for plane in image[0]:
        counts = torch.bincount(plane.flatten().long(), minlength=256)
        step = (plane.numel() - counts[plane.max().long()]) // 255
        before = counts.cumsum(0) - counts
        table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
        tables.append(torch.where(step > 0, table, torch.arange(256, device=image.device)))
    return torch.stack(tables).to(torch.uint8)


def _smoothed(x: Tensor) -> Tensor:
    """PIL's filter SMOOTH on (1, 3, H, W) whole numbers; pixels at the edge stay."""
    result = x.clone()
    if min(x.shape[-2:]) > 2:
        rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * x[..., 1:-1, 1:-1]
        result[..., 1:-1, 1:-1] = (total / 13 + 0.5).floor()
    return result


def _pil(image: Image.Image, operation: int, argument: float, fill: tuple[int, int, int]) -> Image.Image:
    """An operation on a PIL image, as timm calls it."""
    from PIL import Image, ImageEnhance, ImageOps

    bicubic = Image.Resampling.BICUBIC
    if operation == ROTATE:
        return image.rotate(argument, resample=bicubic, fillcolor=fill)
    if operation > ROTATE:
        matrix = _matrix(operation, argument, image.height, image.width)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=bicubic, fillcolor=fill)
    if operation == SOLARIZE_ADD:
        table = [min(255, value + int(argument)) if value < 128 else value for value in range(256)]
        return image.point(table * 3)
    if operation == AUTO_CONTRAST:
        return ImageOps.autocontrast(image)
    if operation == EQUALIZE:
        return ImageOps.equalize(image)
    if operation == INVERT:
        return ImageOps.invert(image)
    if operation == POSTERIZE:
        return ImageOps.posterize(image, int(argument))
    if operation == SOLARIZE:
        return ImageOps.solarize(image, int(argument))
    if operation == SHARPNESS:
        return ImageEnhance.Sharpness(image).enhance(argument)
    if operation == COLOR:
        return ImageEnhance.Color(image).enhance(argument)
    if operation == CONTRAST:
        return ImageEnhance.Contrast(image).enhance(argument)
    return ImageEnhance.Brightness(image).enhance(argument)
