"""A user's own backbone of torch's own parts: BatchNorm, and dropout from torch's global generators."""

from torch import Tensor, nn

from sslrun import Backbone


class OwnBackbone(Backbone):
    """Three convolutions.

    Args:
        dropout: rate of the dropout.
    """

    num_features = 32

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout),
            nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout2d(dropout),
            nn.Conv2d(16, 32, 3, 2, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.body(images)]
