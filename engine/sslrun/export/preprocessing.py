"""How images are prepared for an encoder, in the terms of other libraries."""

import math
from dataclasses import dataclass
from typing import Any

from sslrun.data.transforms import CenterCrop, Normalize, Resize
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError
from sslrun.preparation import preparation_of
from sslrun.recipe import Recipe


@dataclass(frozen=True)
class Preprocessing:
    """Resize, center crop, divide by 255, normalize. The order of colors is red, green, blue.

    Attributes:
        size: height and width of the encoder's input, in pixels.
        resize: the shorter side before the crop, in pixels, or height and width; None if images are not resized.
        interpolation: "bilinear" or "bicubic", antialiased as PIL's.
        mean: mean of each color, of pixels in 0 to 1.
        std: standard deviation of each color, of pixels in 0 to 1.
    """

    size: tuple[int, int]
    resize: int | tuple[int, int] | None
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return len(self.mean)

    def as_dict(self) -> dict[str, Any]:
        """The preprocessing in a file's metadata."""
        return {
            "color_order": "RGB" if self.channels == 3 else "as in the file",
            "input_size": [self.channels, *self.size],
            "resize": list(self.resize) if isinstance(self.resize, tuple) else self.resize,
            "interpolation": self.interpolation,
            "antialias": True,
            "center_crop": list(self.size),
            "scale": "pixels / 255",
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def for_timm(self) -> dict[str, Any]:
        """timm's `pretrained_cfg`."""
        common = {"input_size": [self.channels, *self.size], "interpolation": self.interpolation}
        colors = {"mean": list(self.mean), "std": list(self.std)}
        if not isinstance(self.resize, int):
            return {**common, "crop_pct": 1.0, "crop_mode": "squash", **colors}
        share = min(self.size) / self.resize
        if math.floor(min(self.size) / share) != self.resize:  # timm divides, and rounds down
            share = min(self.size) / (self.resize + 0.5)
        return {**common, "crop_pct": share, "crop_mode": "center", **colors}

    def for_transformers(self) -> dict[str, Any]:
        """preprocessor_config.json."""
        height, width = self.size
        resize = self.resize or self.size
        size = (
            {"shortest_edge": resize}
            if isinstance(resize, int)
            else dict(zip(("height", "width"), resize, strict=True))
        )
        return {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": True,
            "do_resize": self.resize is not None,
            "size": size,
            "resample": {"bilinear": 2, "bicubic": 3}[self.interpolation],
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def preprocessing_of(recipe: Recipe) -> Preprocessing:
    """How the evaluation of a recipe's encoder prepares images.

    Raises:
        UsageError: other libraries cannot express it.
    """
    transforms = preparation_of(recipe)
    group = ViewGroup(num_views=1, transforms=transforms).for_channels(recipe.data.source.channels)
    steps = [transform for transform in transforms if not isinstance(transform, Normalize)]
    kinds = [type(step) for step in steps]
    if kinds not in ([Resize, CenterCrop], [Resize], [CenterCrop]) or any(step.p != 1.0 for step in steps):
        raise UsageError(
            f"images are prepared by {', '.join(kind.__name__ for kind in kinds)}, which other programs cannot "
            "express: set eval.transforms to Resize, CenterCrop and Normalize, none of them with a p"
        )
    resize = steps[0] if isinstance(steps[0], Resize) else None
    return Preprocessing(
        size=group.size,
        resize=None if resize is None else resize.short_side or resize.size,
        interpolation="bilinear" if resize is None else resize.interpolation,
        mean=group.normalize.mean,
        std=group.normalize.std,
    )
