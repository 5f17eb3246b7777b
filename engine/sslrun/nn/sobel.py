"""A Sobel filter before the backbone, as in the DeepCluster paper: edges instead of colors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.contract import Backbone

HORIZONTAL = [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]
VERTICAL = [[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]]


class Sobel(Backbone):
    """A backbone behind a fixed Sobel filter, as in DeepCluster (Caron et al. 2018, arXiv 1807.05520, section 4.1).

    The filter computes the horizontal and vertical gradient of the mean of the three normalized color channels.

    Args:
        backbone: the network behind the filter, with in_channels = 2.
    """

    kernels: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.num_features = backbone, backbone.num_features
        self.register_buffer("kernels", torch.tensor([[HORIZONTAL], [VERTICAL]]), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        gray = images.mean(dim=1, keepdim=True)
        return self.backbone(F.conv2d(gray, self.kernels, padding=1))

    def layers(self) -> list[list[str]]:
        return [[f"backbone.{name}" for name in names] for names in self.backbone.layers()]

    def branches(self) -> list[nn.Module]:
        return self.backbone.branches()
