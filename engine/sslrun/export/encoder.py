"""A trained encoder with what others need to know of it."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sslrun import __version__
from sslrun.errors import UsageError
from sslrun.export.architecture import ResNetShape, Shape, architecture_of
from sslrun.export.preprocessing import Preprocessing, preprocessing_of
from sslrun.nn.norm import GroupBatchNorm
from sslrun.saved import Saved

ELSEWHERE = "--to safetensors and --to onnx take any backbone"


@dataclass(frozen=True)
class Encoder:
    """What is exported.

    Attributes:
        backbone: in evaluation mode, on the CPU, in float32.
        architecture: which network it is, by its recipe; None where it is neither a ResNet nor a VisionTransformer.
        preprocessing: how images are prepared for it.
        about: where it comes from, for metadata.
    """

    backbone: nn.Module
    architecture: Shape | None
    preprocessing: Preprocessing
    about: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """By our names."""
        return dict(self.backbone.state_dict())

    def shape(self, program: str) -> Shape:
        """Which network it is, for a program that has to know.

        Raises:
            UsageError: the program has no such network, in whatever size.
        """
        if self.architecture is None:
            raise UsageError(f"{program} has no {type(self.backbone).__name__}: {ELSEWHERE}")
        norms = [module for module in self.backbone.modules() if isinstance(module, GroupBatchNorm)]
        if any(norm.weight is None or norm.eps != 1e-5 for norm in norms):
            raise UsageError(f"{program} has BatchNorm with scale, shift and an eps of 1e-5 only: {ELSEWHERE}")
        if isinstance(self.architecture, ResNetShape) and self.architecture.stem != "imagenet":
            raise UsageError(f'{program} has no ResNet with stem = "{self.architecture.stem}": {ELSEWHERE}')
        return self.architecture

    def images(self, number: int = 2) -> Tensor:
        """Noise in the form that it expects, to try it with."""
        generator = torch.Generator().manual_seed(number)
        return torch.randn(number, 3, *self.preprocessing.size, generator=generator)

    def metadata(self, **more: Any) -> str:
        """What every format holds besides the weights, as JSON."""
        return json.dumps({**more, "preprocessing": self.preprocessing.as_dict(), **self.about})


def encoder_of(saved: Saved) -> Encoder:
    """Of a run or a file of weights.

    Raises:
        UsageError: its weights are not finite, or its preparation of images cannot be told to others or does
            not suit it.
    """
    for name, tensor in saved.backbone.state_dict().items():
        if not tensor.isfinite().all():
            raise UsageError(f"{saved.weights}: {name} of the backbone is not finite")
    about = {
        "recipe": saved.name,
        "method": type(saved.recipe.model).__name__,
        "backbone": saved.config.values["model"]["backbone"],
        "weights": saved.weights.name,
        "step": saved.step,
        "epoch": saved.epoch,
        "sslrun": __version__,
    }
    architecture = architecture_of(about["backbone"])
    encoder = Encoder(saved.backbone.float(), architecture, preprocessing_of(saved.recipe), about)
    try:
        encoder.backbone(encoder.images(1))
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"the backbone does not take images as eval.transforms prepares them: {error}") from error
    return encoder
