"""The views of a batch made by PIL, as torchvision makes them: the reference for both modes.

torchvision itself is not imported: its arithmetic on PIL images is a few lines in each transform (`Transform.pil`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import IO

import numpy as np
from PIL import Image

from sslrun.data.graph import Arguments
from sslrun.data.transforms import Numbers, Transform
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError

Twin = Callable[[Image.Image, Numbers], Image.Image]


def views(
    decoded: Sequence[np.ndarray],
    groups: Sequence[ViewGroup],
    arguments: Arguments,
    instead: Mapping[type[Transform], Twin] | None = None,
) -> list[np.ndarray | None]:
    """The views of a batch, made by PIL.

    Args:
        decoded: B images, (H, W, 3) uint8, or (H, W, 1); PIL has no others.
        groups: view groups.
        arguments: of `view_arguments` for these images.
        instead: functions that take the place of some transforms' `pil`.

    Returns:
        For each group (num_views * B, h, w, C) uint8, view-major; None where one of its transforms has no PIL form.
    """
    result: list[np.ndarray | None] = []
    for group, numbers in zip(groups, arguments, strict=True):
        twins = [(instead or {}).get(type(step), step.pil) for step in group.steps]
        if None in twins or group.channels not in (1, 3):
            result.append(None)
            continue
        images = []
        for row in range(group.num_views * len(decoded)):
            pixels = decoded[row % len(decoded)]
            image = Image.fromarray(pixels[..., 0] if group.channels == 1 else pixels)
            for twin, own in zip(twins, numbers, strict=True):
                if own.apply[row]:
                    assert twin is not None
                    image = twin(image, own.rows(row))
            images.append(np.asarray(image).reshape(image.height, image.width, group.channels))
        result.append(np.stack(images))
    return result


def decode(file: str | IO[bytes], channels: int = 3) -> np.ndarray:
    """(H, W, channels) uint8, RGB as torchvision's loader reads it, or gray (1 channel).

    Raises:
        UsageError: PIL cannot; one line.
    """
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(
                image.height, image.width, channels
            )
    except Exception as error:  # Pillow's plugins raise whatever a damaged file leads them to
        raise UsageError(f"{file}: PIL cannot read it: {error}") from None
