"""What sources that keep their decoded images in memory share. With a GPU, the images are kept in its memory.

The published files are read once. One array holds all images; a batch is some of its rows.
"""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from sslrun.config.paths import FilePath, stated
from sslrun.data.sources.base import Source
from sslrun.data.sources.files import is_file
from sslrun.data.sources.paths import Paths
from sslrun.errors import UsageError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class InMemory(Source, listed=False):
    """Base of sources that keep their images: a subclass fills `pixels` in `list_samples`.

    Args:
        data_prefix: folder of the published files, or the folder around it.
        split: part of the data set.
    """

    is_decoded = True

    folders: Sequence[str]
    """Names of the folder that the published archives make."""

    pixels: np.ndarray
    """(N, H, W, 3) uint8."""

    _resident: "torch.Tensor | None" = None
    """`pixels` on the GPU, once they have been asked for there."""

    def __init__(self, data_prefix: FilePath, split: str) -> None:
        self.data_prefix, self.split = data_prefix, split

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data_prefix!r}, {self.split!r})"

    def decoded(self, ids: np.ndarray, device: "torch.device") -> "np.ndarray | torch.Tensor":
        if device.type == "cpu":
            return self.pixels[ids]
        import torch

        if self._resident is None:
            self._resident = torch.from_numpy(self.pixels).to(device)  # once, for all that read this source
        return self._resident[torch.from_numpy(ids).to(device)]

    @property
    def sizes(self) -> np.ndarray:
        count, height, width, _ = self.pixels.shape
        return np.broadcast_to(np.array([height, width], dtype=np.int32), (count, 2))

    def find(self, key: str, *names: str) -> str:
        """The first file that exists among `names`, in `data_prefix` or in the archives' folder below it."""
        for folder in (self.data_prefix, *(os.path.join(self.data_prefix, name) for name in self.folders)):
            for name in names:
                path = os.path.join(folder, name)
                if is_file(path):
                    return os.path.abspath(path)
        problem = stated(self.data_prefix, f" has no {' or '.join(names)}")
        raise UsageError(f"{problem}: set {key}.data_prefix to the folder that holds {' or '.join(self.folders)}")


def numbered(files: Sequence[str], counts: Sequence[int]) -> Paths:
    """Names of images that lie one after the other in some files: `FILE#NUMBER`."""
    return Paths("", (f"{file}#{i}" for file, count in zip(files, counts, strict=True) for i in range(count)))


def parse_file(file: str, parse: Callable[[bytes], T]) -> T:
    """What `parse` makes of a file's content; its ValueError or KeyError becomes a UsageError that names the file."""
    with open(file, "rb") as opened:
        content = opened.read()
    try:
        return parse(content)
    except KeyError as error:
        raise UsageError(f"{file} cannot be read: it has no {error}") from None
    except ValueError as error:
        raise UsageError(f"{file} cannot be read: {error}") from None


def read_lines(file: str) -> list[str]:
    """The lines of a text file that are not blank."""
    with open(file, encoding="utf-8") as opened:
        return [line.strip() for line in opened if line.strip()]
