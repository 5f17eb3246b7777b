"""A trained encoder with what other programs need to know about it."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sslrun import __version__
from sslrun.errors import UsageError
from sslrun.export.architecture import Architecture, ResNetArchitecture, VitArchitecture, architecture_of
from sslrun.export.preprocessing import Preprocessing, preprocessing_of
from sslrun.nn.norm import GroupBatchNorm
from sslrun.randomness import fixed_generator
from sslrun.saved import Saved

ELSEWHERE = "--to safetensors and --to onnx take any backbone"


@dataclass(frozen=True)
class Encoder:
    """A trained encoder, to be exported.

    Attributes:
        backbone: the network, in evaluation mode, on the CPU, in float32.
        architecture: which network it is, by its recipe; None where it is neither a ResNet nor a VisionTransformer.
        preprocessing: how images are prepared for it.
        about: where it comes from (recipe, method, step, ...), for metadata.
    """

    backbone: nn.Module
    architecture: Architecture | None
    preprocessing: Preprocessing
    about: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """The weights and buffers by our names."""
        return dict(self.backbone.state_dict())

    def architecture_for(self, program: str) -> Architecture:
        """Which network it is, for a format that must know.

        Raises:
            UsageError: `program` has no network of this kind.
        """
        if self.architecture is None:
            name = " ".join(filter(None, [type(self.backbone).__name__, getattr(self.backbone, "name", None)]))
            raise UsageError(f"{program} has no {name}: {ELSEWHERE}")
        norms = [module for module in self.backbone.modules() if isinstance(module, GroupBatchNorm)]
        if any(norm.weight is None or norm.eps != 1e-5 for norm in norms):
            raise UsageError(f"{program} has BatchNorm with scale, shift and an eps of 1e-5 only: {ELSEWHERE}")
        if isinstance(self.architecture, ResNetArchitecture) and self.architecture.stem != "imagenet":
            raise UsageError(f'{program} has no ResNet with stem = "{self.architecture.stem}": {ELSEWHERE}')
        if isinstance(self.architecture, VitArchitecture) and self.architecture.global_pool != "token":
            raise UsageError(
                f"{program} would give the class token's output, but the feature of this vision transformer is the "
                f"mean of its patches' outputs (global_pool): {ELSEWHERE}"
            )
        return self.architecture

    def images(self, number: int = 2) -> Tensor:
        """(number, C, H, W) noise of the size that it expects, to test it with."""
        generator = fixed_generator(number)
        return torch.randn(number, self.preprocessing.channels, *self.preprocessing.size, generator=generator)

    def metadata(self, **more: Any) -> str:
        """Preprocessing and origin as JSON, with `more`; every format holds it beside the weights."""
        return json.dumps({**more, "preprocessing": self.preprocessing.as_dict(), **self.about})


def encoder_of(saved: Saved) -> Encoder:
    """The encoder of a run or of a file of weights.

    Raises:
        UsageError: its weights are not finite, or its preparation of images cannot be expressed for other programs or
            does not suit it.
    """
    backbone = saved.backbone.float()
    for name, tensor in backbone.state_dict().items():
        if not tensor.isfinite().all():
            raise UsageError(f"{saved.weights}: {name} of the backbone is not finite")
    table = saved.config.values["model"]["backbone"]
    about = {
        "recipe": saved.name,
        "method": type(saved.recipe.model).__name__,
        "backbone": table,
        "weights": saved.weights.name,
        "step": saved.step,
        "epoch": saved.epoch,
        "sslrun": __version__,
    }
    encoder = Encoder(backbone, architecture_of(table), preprocessing_of(saved.recipe), about)
    try:
        encoder.backbone(encoder.images(1))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UsageError(f"the backbone does not take images as eval.transforms prepares them: {error}") from error
    return encoder
