"""A trained encoder as an object: a torch module, the preparation of its images, and vectors of many images."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sslrun.contract import Backbone
from sslrun.embedding.embed import Settings, embed, embed_to_file
from sslrun.embedding.preparation import Preparation
from sslrun.evaluation.features import vectors
from sslrun.preparation import preparation_of
from sslrun.runtime.guest import guest
from sslrun.saved import Saved

PathLike = str | os.PathLike[str]


class Features(nn.Module):
    """A trained network that gives a vector for each image.

    Attributes:
        backbone: the network that was trained, which returns a list of feature maps; for fine-tuning or dense tasks.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """(B, D) float32 vectors of prepared images (B, 3, H, W): the last feature map, averaged over positions."""
        return vectors(self.backbone(images))


class Encoder:
    """A trained encoder; `sslrun.load` makes it.

    Args:
        saved: weights and recipe.
        device: where it computes.

    Attributes:
        module: a torch module from prepared images (B, 3, H, W) to vectors (B, D), on `device`, in evaluation mode.
        transform: prepares a PIL image, or the file at a path, as evaluations do: a tensor (3, H, W), float32.
        device: where `module` is.
        name: name of the recipe.
        weights: the checkpoint or file that the weights are from.
        step: optimizer steps that the weights were trained for; None for a file of weights.
    """

    def __init__(self, saved: Saved, device: torch.device) -> None:
        self.device, self.name, self.weights, self.step = device, saved.name, saved.weights, saved.step
        self.module = Features(saved.backbone).to(device).eval()
        self.transform = Preparation(preparation_of(saved.recipe), saved.recipe.data.source)
        self._saved = saved

    def __repr__(self) -> str:
        return f"Encoder({self.name!r}, {str(self.weights)!r}, {str(self.device)!r})"

    def embed(
        self,
        images: PathLike | Sequence[PathLike],
        *,
        batch_size: int = 128,
        out: PathLike | None = None,
        l2: bool = False,
        force: bool = False,
    ) -> np.ndarray:
        """(N, D) float32 vectors of images, as `sslrun embed` computes them.

        A row is NaN where an image cannot be decoded; such images are named and counted in a warning. Under a launcher
        all ranks call it, share the work and get all rows.

        Args:
            images: a folder, whose images are taken in sorted order of their paths (`sslrun.images` lists them); a list
                of paths, whose order the rows have; an image file; or a recipe, of which data.source is taken.
            batch_size: number of images that enter the network at once.
            out: a file to write as well: .npz or .parquet with the paths, or .npy with the paths in a text file beside
                it. What is done of it survives an interruption, and the same call goes on.
            l2: whether vectors are scaled to length 1.
            force: whether `out` may be replaced.

        Raises:
            UsageError: there are no images, or `out` cannot be written.
            RunFailed: no image can be decoded, a vector is not finite, or the disk is full.
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        subject = os.fspath(images) if isinstance(images, str | os.PathLike) else [os.fspath(path) for path in images]
        settings = Settings(batch_size, l2)
        with guest():
            if out is None:
                return embed(self._saved, self.device, subject, settings)
            return embed_to_file(self._saved, self.device, subject, settings, Path(out), force).read()
