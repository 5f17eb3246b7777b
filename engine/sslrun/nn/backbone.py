"""What a backbone is to the rest of the house."""

from torch import Tensor, nn

from sslrun.config.component import Component


class Backbone(nn.Module, Component, kind="backbones"):
    """Images in, feature maps out.

    `forward((B, C, H, W))` returns feature maps, (B, C', H', W') each, or features (B, C'); the last is what necks and
    evaluation use. `num_features` is its number of channels.
    """

    num_features: int

    def forward(self, images: Tensor) -> list[Tensor]:
        raise NotImplementedError
