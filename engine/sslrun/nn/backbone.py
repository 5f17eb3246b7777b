"""What a backbone is to the rest of the house."""

from torch import Tensor, nn

from sslrun.config.component import Component
from sslrun.errors import UsageError


class Backbone(nn.Module, Component, kind="backbones"):
    """Images in, feature maps out.

    `forward((B, C, H, W))` returns feature maps, (B, C', H', W') each, or features (B, C'); the last is what necks and
    evaluation use. `num_features` is its number of channels.
    """

    num_features: int

    def forward(self, images: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def layers(self) -> list[list[str]]:
        """Names of its parts from the input to the output, those of one depth together: what a layer-wise decay of the
        learning rate counts. What is not named (a last norm) lies as high as a classifier."""
        raise UsageError(f"{type(self).__name__} does not say which of its layers lies how deep")

    def branches(self) -> list[nn.Module]:
        """The parts whose output is added to what goes past them, from the input to the output: what stochastic depth
        leaves out."""
        raise UsageError(f"{type(self).__name__} does not say what its residual branches are")
