"""Projectors between a backbone's feature map and a loss."""

import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.config.component import Component
from sslrun.contract import Backbone
from sslrun.nn.argument_checks import require_positive, require_rate
from sslrun.nn.norm import BN, Norm, SyncBN


class Neck(nn.Module, Component, kind="necks"):
    """A projector from a feature map (B, C, H, W), or features (B, C), to embeddings (B, D), not normalized.

    Attributes:
        out_channels: dimension D of the embeddings.
    """

    out_channels: int

    def require_out_channels(self, feat_dim: int) -> None:
        """Raises ValueError if the embeddings do not have `feat_dim` dimensions."""
        if feat_dim != self.out_channels:
            raise ValueError(f"feat_dim is {feat_dim}, but the neck gives {self.out_channels} channels (out_channels)")

    def forward(self, features: Tensor) -> Tensor:
        raise NotImplementedError


def pooled(features: Tensor) -> Tensor:
    """Averages a feature map (B, C, H, W) over its positions; returns features (B, C) unchanged."""
    return features.mean(dim=(2, 3)) if features.dim() == 4 else features


class AvgPool2dNeck(Neck):
    """Global average pool without a projection.

    Args:
        in_channels: channels of the feature map.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        require_positive(in_channels=in_channels)
        self.out_channels = in_channels

    def forward(self, features: Tensor) -> Tensor:
        return pooled(features)


class LinearNeck(Neck):
    """Global average pool, linear: the projector of NPID and of MoCo v1.

    Args:
        in_channels: channels of the feature map.
        out_channels: dimension D of the embedding.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, out_channels=out_channels)
        self.out_channels = out_channels
        self.fc = nn.Linear(in_channels, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc(pooled(features))


class MoCoV2Neck(Neck):
    """Global average pool, linear, ReLU, linear: the projector of MoCo v2 (Chen et al. 2020, arXiv 2003.04297).

    Args:
        in_channels: channels of the feature map.
        hid_channels: width of the hidden layer.
        out_channels: dimension D of the embedding.
        with_avg_pool: whether the feature map is averaged over its positions first; if false, the input is (B, C).
    """

    def __init__(self, in_channels: int, hid_channels: int, out_channels: int, with_avg_pool: bool = True) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, hid_channels=hid_channels, out_channels=out_channels)
        self.with_avg_pool = with_avg_pool
        self.out_channels = out_channels
        self.mlp = nn.Sequential(
            nn.Linear(in_channels, hid_channels), nn.ReLU(inplace=True), nn.Linear(hid_channels, out_channels)
        )

    def forward(self, features: Tensor) -> Tensor:
        if self.with_avg_pool:
            features = features.mean(dim=(2, 3))
        return self.mlp(features)


class DenseCLNeck(Neck):
    """The two projectors of DenseCL (Wang et al. 2021, arXiv 2011.09157, section 3.2): global average pool, linear,
    ReLU, linear; and the same layers without the pool, applied to every cell of the feature map.

    Args:
        in_channels: channels of the feature map.
        hid_channels: width of the hidden layers.
        out_channels: dimension D of the embeddings.
    """

    def __init__(self, in_channels: int, hid_channels: int, out_channels: int) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, hid_channels=hid_channels, out_channels=out_channels)
        self.out_channels = out_channels
        self.mlp = nn.Sequential(
            nn.Linear(in_channels, hid_channels), nn.ReLU(inplace=True), nn.Linear(hid_channels, out_channels)
        )
        self.mlp2 = nn.Sequential(
            nn.Conv2d(in_channels, hid_channels, 1), nn.ReLU(inplace=True), nn.Conv2d(hid_channels, out_channels, 1)
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Three embeddings of a feature map (B, C, S, S), not normalized: global (B, D), dense (B, D, S^2), and dense
        averaged over its cells (B, D)."""
        dense = self.mlp2(features).flatten(2)
        return self.mlp(pooled(features)), dense, dense.mean(dim=2)


class NonLinearNeck(Neck):
    """Global average pool and an MLP with batch normalization: hidden layers of linear, norm and ReLU, then a last
    linear layer, with or without norm.

    It is the projector of SimCLR, BYOL, SimSiam, SwAV, Barlow Twins, VICReg and MoCo v3, and the predictor of BYOL,
    SimSiam and MoCo v3.

    Args:
        in_channels: channels of the input, a feature map or, for a predictor, an embedding.
        hid_channels: width of the hidden layers.
        out_channels: dimension D of the embedding.
        num_layers: number of linear layers, 2 or more.
        with_bias: whether the hidden linear layers have a bias, besides that of their norm.
        with_last_bn: whether a norm follows the last linear layer.
        with_last_bn_affine: whether the last norm learns a scale and a shift.
        with_last_bias: whether the last linear layer has a bias.
        norm_cfg: normalization layer.
    """

    def __init__(
        self,
        in_channels: int,
        hid_channels: int,
        out_channels: int,
        num_layers: int = 2,
        with_bias: bool = False,
        with_last_bn: bool = True,
        with_last_bn_affine: bool = True,
        with_last_bias: bool = False,
        norm_cfg: Norm = SyncBN(),
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, hid_channels=hid_channels, out_channels=out_channels)
        if num_layers < 2:
            raise ValueError(f"num_layers is {num_layers}, expected 2 or more; LinearNeck has one")
        self.out_channels = out_channels
        layers: list[nn.Module] = []
        channels = in_channels
        for _ in range(num_layers - 1):
            layers += [
                nn.Linear(channels, hid_channels, with_bias),
                norm_cfg.layer(hid_channels),
                nn.ReLU(inplace=True),
            ]
            channels = hid_channels
        layers.append(nn.Linear(channels, out_channels, with_last_bias))
        if with_last_bn:
            layers.append(norm_cfg.layer(out_channels, with_last_bn_affine))
        self.mlp = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(pooled(features))


class ODCNeck(Neck):
    """Global average pool, linear, norm, ReLU, dropout, linear, ReLU: the projector of ODC (Zhan et al. 2020, arXiv
    2006.10645, section 4.1).

    Args:
        in_channels: channels of the feature map.
        hid_channels: width of the hidden layer.
        out_channels: dimension D of the embedding.
        dropout: dropout rate of the hidden layer in training, 0 to below 1.
        norm_cfg: normalization layer.
    """

    def __init__(
        self,
        in_channels: int,
        hid_channels: int,
        out_channels: int,
        dropout: float = 0.5,
        norm_cfg: Norm = SyncBN(momentum=0.001, affine=False),
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, hid_channels=hid_channels, out_channels=out_channels)
        require_rate(dropout=dropout)
        self.hid_channels, self.out_channels, self.dropout = hid_channels, out_channels, dropout
        self.fc0 = nn.Linear(in_channels, hid_channels)
        self.bn0 = norm_cfg.layer(hid_channels)
        self.fc1 = nn.Linear(hid_channels, out_channels)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embeddings (B, D), 0 or more.

        Args:
            features: (B, C, H, W) or (B, C).
            mask: (B, hid_channels), from `sslrun.nn.dropout`; needed in training with dropout.
        """
        assert self.dropout == 0 or (mask is None) != self.training, "dropout is for training, and needs a mask there"
        hidden = F.relu(self.bn0(self.fc0(pooled(features))), inplace=True)
        return F.relu(self.fc1(hidden if mask is None else hidden * mask), inplace=True)


class RelativeLocNeck(Neck):
    """Linear, norm, ReLU and dropout on the concatenated features of two patches: the hidden layer of RelativeLoc
    (Doersch et al. 2015, arXiv 1505.05192, figure 3).

    Args:
        in_channels: channels C of one patch's features.
        out_channels: width D of the layer.
        dropout: dropout rate of the layer in training, 0 to below 1.
        norm_cfg: normalization layer.
    """

    def __init__(
        self, in_channels: int, out_channels: int, dropout: float = 0.5, norm_cfg: Norm = BN(momentum=0.003)
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, out_channels=out_channels)
        require_rate(dropout=dropout)
        self.out_channels, self.dropout = out_channels, dropout
        self.fc = nn.Linear(2 * in_channels, out_channels)
        self.bn = norm_cfg.layer(out_channels)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden features (B, D), 0 or more.

        Args:
            features: (B, 2C), pooled features of two patches.
            mask: (B, D), from `sslrun.nn.dropout`; needed in training with dropout.
        """
        assert self.dropout == 0 or (mask is None) != self.training, "dropout is for training, and needs a mask there"
        hidden = F.relu(self.bn(self.fc(features)), inplace=True)
        return hidden if mask is None else hidden * mask


class Embedder(nn.Module):
    """A backbone and its neck as one module, (B, 3, H, W) to (B, D); for the `features` of `Method.before_epoch`."""

    def __init__(self, backbone: Backbone, neck: Neck) -> None:
        super().__init__()
        self.backbone, self.neck = backbone, neck

    def forward(self, images: Tensor) -> Tensor:
        return self.neck(self.backbone(images)[-1])
