"""Features of images under a frozen encoder: what every evaluation, and every clustering method, starts from."""

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.contract import Batch
from sslrun.data import BatchStream, Loader, Sequential, Source, ViewGroup
from sslrun.data.loader import Augment
from sslrun.data.transforms import CenterCrop, Resize, Transform
from sslrun.errors import RunFailed
from sslrun.runtime import distributed
from sslrun.runtime.log import shown

BATCH = 128


class FeatureExtractor:
    """Features of the images of one source, prepared without randomness; ranks share the work.

    Args:
        source: opened.
        transforms: how to prepare the images.
        device: where the network is.
        bf16: compute under bfloat16 autocast.
        augment: "exact", "dali" or "auto", as for training.
        num_threads: threads that read and decode.
        has_bar: whether a bar on the terminal shows how far it has come.
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
    ) -> None:
        self.source, self.transforms, self.device, self.bf16 = source, transforms, device, bf16
        self.has_bar = has_bar
        self.loader = Loader(
            source,
            [ViewGroup(num_views=1, transforms=transforms)],
            sampler=Sequential(len(source)),
            seed=0,
            batch_size=BATCH,
            device=device,
            augment=augment,
            num_threads=num_threads,
        )

    def extract_share(self, module: nn.Module, ids: np.ndarray) -> Tensor:
        """(n, D) fp32 on the CPU, a row for each of the ids in this rank's share (`distributed.share`) of the (N,).

        All ranks call it, and call the module equally often: where it is sharded, each call gathers its parameters.
        """
        mine = ids[distributed.share(len(ids))]
        most = -(-len(ids) // distributed.world_size())
        return self._rows(module, np.resize(mine, most))[: len(mine)]

    def extract(self, module: nn.Module, ids: np.ndarray) -> Tensor:
        """(N, D) fp32 on the CPU, a row for each of the (N,) ids, the same on all ranks; all ranks call it."""
        rows = self.extract_share(module, ids)
        return distributed.all_gather_shares(rows.to(self.device), len(ids)).cpu()

    def stream_share(self, module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """The samples of this rank's share (`distributed.share`) of the source, in order, batch after batch.

        Features (b, D) fp32 and the ids (b,) of the samples that they are of (of a bad image: its substitute's), on
        the CPU. The module must be in evaluation mode.
        """
        mine = np.arange(len(self.source))[distributed.share(len(self.source))]
        with contextlib.closing(self._run(mine)) as stream:
            for batch in self._shown(stream, len(mine)):
                yield pooled(module, batch.to(self.device).views[0], self.bf16).cpu(), batch.index.cpu()

    def _rows(self, module: nn.Module, ids: np.ndarray) -> Tensor:
        return extract(module, self._shown(self._run(ids), len(ids)), self.device, self.bf16)

    def _shown(self, batches: Iterable[Batch], samples: int) -> Iterable[Batch]:
        return shown(batches, -(-samples // BATCH), repr(self.source)) if self.has_bar else batches

    def _run(self, ids: np.ndarray) -> BatchStream:
        return self.loader.run([(0, ids[first : first + BATCH]) for first in range(0, len(ids), BATCH)])


def evenly(num_samples: int, most: int) -> np.ndarray:
    """(min(num_samples, most),) int64: sample ids at even distances; of sorted class folders about as many of each."""
    return np.linspace(0, num_samples - 1, min(num_samples, most)).astype(np.int64)


def unit_rows(features: Tensor, device: torch.device) -> Tensor:
    """The rows at length 1, fp32, on a device."""
    return F.normalize(features.to(device).float(), dim=1)


def require_finite(features: Tensor) -> None:
    """RunFailed where a feature is infinite or no number."""
    bad = len(features) - int(torch.isfinite(features).all(1).sum())
    if bad:
        raise RunFailed(f"the features of {bad} of {len(features)} images are not finite: there is nothing to measure")


def center_crop_like(group: ViewGroup) -> list[Transform]:
    """Short side to 8/7 of the view's size, center crop, the view's own normalization: 256 and 224 for ImageNet."""
    height, width = group.size
    return [Resize(round(min(height, width) * 8 / 7)), CenterCrop([height, width]), group.normalize]


@torch.no_grad()
def extract(module: nn.Module, batches: Iterable[Batch], device: torch.device, bf16: bool = False) -> Tensor:
    """What a module makes of images (`pooled`), (N, D) fp32 on the CPU, one row per sample in the order of `batches`.

    The module is put into evaluation mode and back; nothing else about it changes.
    """
    with evaluating(module):
        return torch.cat([pooled(module, batch.to(device).views[0], bf16).cpu() for batch in batches])


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within it the module is in evaluation mode; afterwards each of its parts is in its own again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@torch.no_grad()
def pooled(module: nn.Module, images: Tensor, bf16: bool = False) -> Tensor:
    """What a module makes of images (B, 3, H, W): (B, D) fp32, without gradient.

    Rows (B, D) are taken as they are, feature maps (B, C, H, W) averaged over positions, and of a list the last entry.
    """
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
        features = module(images)
    features = (features[-1] if isinstance(features, list) else features).float()
    return features.mean(dim=(2, 3)) if features.dim() == 4 else features
