"""Extracts features of images with a frozen encoder, for evaluations, monitors and clustering methods."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.data.bad_samples import BadSamples
from sslrun.data.loader import Augment, Loader
from sslrun.data.order import Sequential
from sslrun.data.sources import Source
from sslrun.data.transforms import CenterCrop, Resize, Transform
from sslrun.data.views import ViewGroup
from sslrun.errors import RunFailed
from sslrun.runtime import compilation, distributed
from sslrun.runtime.log import shown
from sslrun.runtime.stopping import stoppable

BATCH = 128


class FeatureExtractor:
    """Extracts features of the images of one source, prepared without randomness; ranks share the work.

    Args:
        source: the images, opened.
        transforms: how images are prepared.
        device: the device of the network.
        bf16: whether to compute under bfloat16 autocast.
        augment: "exact", "dali" or "auto", as for training.
        num_threads: threads that read and decode.
        has_bar: whether to show a progress bar on the terminal.
        batch_size: largest number of images in a batch.
        bad: counts images that cannot be decoded, and limits their number; None for the limit of 1 %.
    """

    def __init__(
        self,
        source: Source,
        transforms: list[Transform],
        *,
        device: torch.device,
        bf16: bool = False,
        augment: Augment = "auto",
        num_threads: int = 1,
        has_bar: bool = False,
        batch_size: int = BATCH,
        bad: BadSamples | None = None,
    ) -> None:
        self.source, self.transforms, self.device, self.bf16 = source, transforms, device, bf16
        self.has_bar, self.batch_size = has_bar, batch_size
        self.loader = Loader(
            source,
            [ViewGroup(num_views=1, transforms=transforms)],
            sampler=Sequential(len(source)),
            seed=0,
            batch_size=batch_size,
            device=device,
            augment=augment,
            num_threads=num_threads,
            bad=bad,
        )

    def extract_share(self, module: nn.Module, ids: np.ndarray) -> Tensor:
        """(n, D) fp32 on the CPU: features of this rank's share (`distributed.share`) of the (N,) ids.

        All ranks call it. It calls the module equally often on each rank, because each call of a sharded module is
        collective. A stop that a run is asked for is heard at each batch.
        """
        mine = ids[distributed.share(len(ids))]
        most = -(-len(ids) // distributed.world_size())
        return self._rows(module, np.resize(mine, most))[: len(mine)]

    def extract(self, module: nn.Module, ids: np.ndarray) -> Tensor:
        """(N, D) fp32 on the CPU: features of the (N,) ids, the same on all ranks; all ranks call it."""
        rows = self.extract_share(module, ids)
        return distributed.all_gather_shares(rows.to(self.device), len(ids)).cpu()

    def stream_share(self, module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields features (b, D) fp32 and sample ids (b,) on the CPU, batch by batch.

        The samples are this rank's share (`distributed.share`) of the source, in order; the id of a bad image is that
        of its substitute. The module must be in evaluation mode.
        """
        return self._stream(module, np.arange(len(self.source))[distributed.share(len(self.source))])

    def _rows(self, module: nn.Module, ids: np.ndarray) -> Tensor:
        """(N, D) fp32 on the CPU: features of the (N,) ids; the module is in evaluation mode meanwhile."""
        with evaluating(module):
            return torch.cat([features for features, _ in stoppable(self._stream(module, ids))])

    def _stream(self, module: nn.Module, ids: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.batch_size
        return self.stream_batches(module, [ids[first : first + size] for first in range(0, len(ids), size)])

    def stream_batches(self, module: nn.Module, batches: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """As `stream_share`, for batches of ids that the caller has made, (b,) each and not above `batch_size`."""
        cursor = [(0, ids) for ids in batches]
        is_compiled = compilation.is_compiled(module)
        with contextlib.closing(self.loader.run(cursor)) as stream:
            for batch in shown(stream, len(cursor), repr(self.source)) if self.has_bar else stream:
                images = batch.to(self.device).views[0]
                rows = len(images)
                if is_compiled:
                    compilation.begin_generation()
                    images = filled(images, self.batch_size)
                yield pooled(module, images, self.bf16)[:rows].cpu(), batch.index.cpu()


def filled(images: Tensor, rows: int) -> Tensor:
    """(rows, ...): the images, repeated until there are as many. A compiled network then sees one batch size alone."""
    return images if len(images) == rows else torch.cat([images] * -(-rows // len(images)))[:rows]


def evenly(num_samples: int, most: int) -> np.ndarray:
    """(min(num_samples, most),) int64: sample ids at even distances; sorted classes are about equally frequent."""
    return np.linspace(0, num_samples - 1, min(num_samples, most)).astype(np.int64)


def unit_rows(features: Tensor, device: torch.device) -> Tensor:
    """The rows scaled to length 1, fp32, on the device."""
    return F.normalize(features.to(device).float(), dim=1)


def require_finite(features: Tensor) -> None:
    """Raises RunFailed if a feature is infinite or NaN."""
    bad = len(features) - int(torch.isfinite(features).all(1).sum())
    if bad:
        raise RunFailed(f"the features of {bad} of {len(features)} images are not finite: there is nothing to measure")


def center_crop_like(group: ViewGroup) -> list[Transform]:
    """Resize (short side 8/7 of the view's size), center crop, the view's normalization: 256 and 224 for ImageNet."""
    height, width = group.size
    return [Resize(round(min(height, width) * 8 / 7)), CenterCrop([height, width]), group.normalize]


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode; at the end, each submodule is back in its own mode."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode


@torch.no_grad()
def pooled(module: nn.Module, images: Tensor, bf16: bool = False) -> Tensor:
    """(B, D) fp32: a module's features of images (B, 3, H, W), without gradient; see `vectors`."""
    weights = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), images)
    if weights.dtype == torch.float64:  # engine.precision = "fp64"
        images = images.double()
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
        outputs = module(images)
    return vectors(outputs)


def vectors(outputs: Tensor | list[Tensor]) -> Tensor:
    """(B, D) fp32: a vector for each image, of what a network returns.

    Of a list of outputs the last is used. Feature maps (B, C, H, W) are averaged over positions.
    """
    features = (outputs[-1] if isinstance(outputs, list) else outputs).float()
    return features.mean(dim=(2, 3)) if features.dim() == 4 else features
