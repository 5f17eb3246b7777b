from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sslrun.data.operations import BLUR, Operation, applied
from sslrun.data.transforms.base import Numbers, Transform, per_image
from sslrun.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

# Standard deviations at which the Gaussian ends: a tap beyond is less than half a unit of the fixed point in use.
REACH = 4.0

# Pixels: DALI takes three weights for it, of which the outer two are 0. It does not take 0.
_NO_BLUR = 0.01


class GaussianBlur(Transform):
    """Blurs with a Gaussian whose standard deviation is drawn uniformly; the border is reflected.

    Args:
        sigma_min: smallest standard deviation in pixels.
        sigma_max: largest standard deviation in pixels.
        p: probability of blurring an image.
    """

    num_draws = 2
    ignores_flips = True
    dali_frames = True

    def __init__(self, sigma_min: float = 0.1, sigma_max: float = 2.0, p: float = 0.5) -> None:
        super().__init__(p=p)
        if not 0.0 < sigma_min <= sigma_max:
            raise UsageError(
                f"sigma_min and sigma_max must satisfy 0 < sigma_min <= sigma_max, not {sigma_min}, {sigma_max}"
            )
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> Numbers:
        """Its numbers: `sigma` (N,), pixels."""
        sigma = self.sigma_min + uniforms[:, 1] * (self.sigma_max - self.sigma_min)
        return Numbers(uniforms[:, 0] < self.p, sizes, {"sigma": sigma.astype(np.float32)})

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if size is not None and min(size) <= math.ceil(REACH * self.sigma_max):
            raise UsageError(f"views of {min(size)} pixels are too small for a blur of {self.sigma_max}")
        return size

    def torch_block(self, x: Tensor, numbers: Numbers) -> Tensor:
        """Rounded to 1/16 level between the passes and to a level at the end."""
        import torch
        import torch.nn.functional as F

        _, _, height, width = x.shape
        horizontal, vertical = (per_image(taps, x) for taps in blur_taps(numbers["sigma"]))
        reach = horizontal.shape[1] - 1
        padded = F.pad(x, (reach, reach, reach, reach), mode="reflect")
        rows = _filter(padded, horizontal, dim=3, length=width).mul_(2.0**-12).add_(0.5).floor_()
        return torch.mul(_filter(rows, vertical, dim=2, length=height), 2.0**-16, out=x).add_(0.5).floor_()

    def operations(self, numbers: Numbers) -> list[Operation]:
        widest = math.ceil(REACH * float(np.float32(self.sigma_max)))
        taps = np.stack(blur_taps(numbers["sigma"][numbers.apply], widest))
        return [applied(BLUR, numbers.apply, taps=taps)]

    def dali_arguments(self, numbers: Numbers) -> dict[str, np.ndarray]:
        return {"sigma": np.where(numbers.apply, numbers["sigma"], np.float32(_NO_BLUR))}

    def dali(self, image: Any, nodes: dict[str, Any]) -> Any:
        from nvidia.dali import fn

        return fn.gaussian_blur(image, sigma=nodes["sigma"])

    def pil(self, image: Image.Image, numbers: Numbers) -> Image.Image:
        """PIL's own: three box blurs."""
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(radius=float(numbers["sigma"])))

    def describe(self, numbers: Numbers) -> dict[str, Any]:
        return {"sigma_px": float(numbers["sigma"])}


def blur_taps(sigma: np.ndarray, widest: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian weights in whole numbers, center first, one side only.

    Args:
        sigma: (N,) pixels.
        widest: how many taps there are beside the center; None: as many as the largest sigma needs.

    Returns:
        (N, taps) for the horizontal pass, which sum to 2**16 with both sides, and for the vertical pass, to 2**12: with
        pixels of 8 bits, and of 12 after the first pass, every sum stays below 2**24. An image's weights do not depend
        on the other images; beyond its own reach they are zero.
    """
    widths = sigma.astype(np.float64)[:, None]
    reach = np.ceil(REACH * widths)
    distance = np.arange((int(reach.max()) if widest is None else widest) + 1)
    weights = np.exp(-0.5 * (distance / widths) ** 2) * (distance <= reach)
    weights /= 2.0 * weights.sum(axis=1, keepdims=True) - weights[:, :1]

    def whole(total: int) -> np.ndarray:
        taps = np.rint(weights * total)
        taps[:, 0] = total - 2.0 * taps[:, 1:].sum(axis=1)
        return taps.astype(np.float32)

    return whole(2**16), whole(2**12)


def _filter(padded: Tensor, taps: Tensor, dim: int, length: int) -> Tensor:
    import torch

    center, *sides = taps.unbind(1)
    reach = len(sides)
    total = padded.narrow(dim, reach, length) * center
    pair = torch.empty_like(total)
    for distance, weight in enumerate(sides, start=1):
        torch.add(padded.narrow(dim, reach - distance, length), padded.narrow(dim, reach + distance, length), out=pair)
        total.addcmul_(pair, weight)
    return total
