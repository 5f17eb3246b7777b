"""The preparation of single images for a trained encoder, as evaluations do it."""

import io
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslrun.config.paths import absolute
from sslrun.data import pil_twins
from sslrun.data.exact import ExactStage
from sslrun.data.graph import view_arguments
from sslrun.data.levels import Range, in_8_bits
from sslrun.data.sources.files import read_file
from sslrun.data.split import has_torch_form
from sslrun.data.transforms import Transform
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError

CPU = torch.device("cpu")


class Preparation:
    """Prepares images by the arithmetic of the data path, without DALI. Workers of a DataLoader may use it.

    Like the data path it does not apply the EXIF rotation. PIL decodes the files of which it is given the paths.

    Args:
        transforms: how images are prepared.
        range: how files with values beyond whole numbers from 0 to 255 are read.
    """

    def __init__(self, transforms: Sequence[Transform], range: Range) -> None:
        self._views, self._range = [ViewGroup(num_views=1, transforms=list(transforms))], range
        self._stages: dict[int, ExactStage] = {}  # by process: a fork does not inherit its threads

    def __call__(self, image: Image.Image | str | os.PathLike[str]) -> Tensor:
        """(3, H, W) float32 of a PIL image of any mode, or of the image file at a path.

        Raises:
            UsageError: the file cannot be read or decoded, or the recipe prepares images in a way that needs DALI.
        """
        for step in self._views[0].steps:
            if not has_torch_form(step):
                raise UsageError(f"{type(step).__name__} runs in DALI alone: set eval.transforms to others")
        pixels = self._pixels(image)
        arguments = view_arguments(self._views, 0, 0, np.zeros(1, dtype=np.int64), np.array([pixels.shape[:2]]))
        (view,) = self._stage([[torch.from_numpy(pixels.copy())]], arguments)
        return view[0].contiguous().clone()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_stages": {}}

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a prepared image."""
        return self._views[0].size

    @property
    def _stage(self) -> ExactStage:
        if os.getpid() not in self._stages:
            self._stages[os.getpid()] = ExactStage(self._views, CPU)
        return self._stages[os.getpid()]

    def _pixels(self, image: Image.Image | str | os.PathLike[str]) -> np.ndarray:
        """(H, W, 3) uint8."""
        if not isinstance(image, Image.Image):
            path = absolute(os.fspath(image))
            try:
                content = read_file(path)
            except OSError as error:
                raise UsageError(f"{path}: {error.strerror}") from None
            return self._decoded(content, path)
        if image.mode in ("F", "I") or image.mode.startswith("I;16"):
            file = io.BytesIO()
            image.save(file, "TIFF")
            return self._decoded(file.getvalue(), "the image")
        return np.asarray(image.convert("RGB"))

    def _decoded(self, content: bytes, name: str) -> np.ndarray:
        try:
            return pil_twins.decode(io.BytesIO(in_8_bits(content, self._range)))
        except ValueError as error:  # a UsageError of `decode` is one
            reason = str(error).rpartition("PIL cannot read it: ")[2]
            reason = "PIL knows no such image" if "cannot identify" in reason else reason
            raise UsageError(f"{name} cannot be decoded: {reason}") from None
