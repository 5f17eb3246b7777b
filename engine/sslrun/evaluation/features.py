"""Features of pictures under a frozen encoder: what every evaluation starts from."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sslrun.data.batch import Batch


@torch.no_grad()
def extract(backbone: nn.Module, batches: Iterable[Batch], device: torch.device, bf16: bool = False) -> Tensor:
    """Globally averaged last feature maps, (N, D) fp32 on the CPU, one row per sample in the order of `batches`.

    The network is put into evaluation mode and back; nothing else about it changes.
    """
    was_training = backbone.training
    backbone.eval()
    rows = []
    try:
        for batch in batches:
            images = batch.to(device).views[0]
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                features = backbone(images)[-1]
            rows.append(features.float().mean(dim=(2, 3)).cpu())
    finally:
        backbone.train(was_training)
    return torch.cat(rows)
