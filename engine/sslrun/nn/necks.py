"""Projectors between a backbone's feature map and a loss."""

from torch import Tensor, nn

from sslrun.config.component import Component


class Neck(nn.Module, Component, kind="necks"):
    """A feature map (B, C, H, W), or features (B, C), in; embeddings (B, D) out, not normalised."""

    out_channels: int

    def forward(self, features: Tensor) -> Tensor:
        raise NotImplementedError


class MoCoV2Neck(Neck):
    """Global average pool, linear, ReLU, linear: the projector of MoCo v2 (Chen et al. 2020, arXiv 2003.04297).

    Args:
        in_channels: channels of the feature map.
        hid_channels: width of the hidden layer.
        out_channels: dimension D of the embedding.
        with_avg_pool: average the feature map over its positions first; without it the input is (B, C).
    """

    def __init__(self, in_channels: int, hid_channels: int, out_channels: int, with_avg_pool: bool = True) -> None:
        super().__init__()
        self.with_avg_pool = with_avg_pool
        self.out_channels = out_channels
        self.mlp = nn.Sequential(
            nn.Linear(in_channels, hid_channels), nn.ReLU(inplace=True), nn.Linear(hid_channels, out_channels)
        )

    def forward(self, features: Tensor) -> Tensor:
        if self.with_avg_pool:
            features = features.mean(dim=(2, 3))
        return self.mlp(features)
