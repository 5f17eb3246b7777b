"""Parts of a network that draw random numbers in training: stochastic depth and jittered rotary positions.

They draw from torch's global generator of the device, which the engine seeds for each micro-batch. Momentum encoders
draw nothing, although they are in training mode (for BatchNorm): `teacher_of` turns these parts off.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Stochastic(nn.Module):
    """A part that draws random numbers in training, unless `draws` is false."""

    draws = True

    @property
    def is_drawing(self) -> bool:
        return self.training and self.draws


class DropPath(Stochastic):
    """A residual branch that is computed for a random part of the samples alone, and counts more for these.

    Stochastic depth (Huang et al. 2016, arXiv 1603.09382) by batch subset, as in DINOv2 (Oquab et al. 2023, arXiv
    2304.07193, section 5): of B samples max(1, int(B (1 - rate))) keep the branch, whose output is multiplied by B over
    their number. The others save its time and memory.

    Args:
        rate: share of the samples without the branch, 0 to below 1.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x + branch(x), for x (B, ...)."""
        if not (self.is_drawing and self.rate):
            return x + branch(x)
        count = max(1, int(len(x) * (1 - self.rate)))
        chosen = torch.randperm(len(x), device=x.device)[:count]
        return x.index_add(0, chosen, branch(x.index_select(0, chosen)).to(x.dtype), alpha=len(x) / count)


class RotaryPositions(Stochastic):
    """Axial rotary positions, as in DINOv3 (Siméoni et al. 2025, arXiv 2508.10104): the numbers of a query and a key
    are turned in pairs by angles that grow with the patch's row and column.

    Coordinates of patch centers go from -1 to 1 along each side, whatever the number of patches: attention between two
    patches depends on the difference of their places alone. In training all coordinates of a block are multiplied by
    exp(U(-ln rescale, ln rescale)), drawn anew for each block.

    Args:
        head_width: numbers d of a head, a multiple of 4.
        blocks: number of blocks.
        rescale: largest factor of the coordinates in training, 1 for none.
        base: the longest period; periods are base^(2 j / (d / 2)) for j < d / 4.
    """

    periods: Tensor

    def __init__(self, head_width: int, blocks: int, rescale: float, base: float = 100.0) -> None:
        super().__init__()
        self.blocks, self.rescale = blocks, rescale
        exponents = torch.arange(head_width // 4) * 2 / (head_width // 2)
        self.register_buffer("periods", base**exponents)

    def forward(self, height: int, width: int) -> Tensor:
        """(2, blocks or 1, T, d): sines and cosines of the angles of T = height * width patches, row by row. Of blocks
        with the same angles there is one."""
        sides = [
            (torch.arange(n, device=self.periods.device, dtype=self.periods.dtype) + 0.5) / n * 2 - 1
            for n in (height, width)
        ]
        places = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 1)
        if self.is_drawing and self.rescale > 1:
            most = math.log(self.rescale)
            factors = places.new_empty(self.blocks, 1, 1, 1).uniform_(-most, most).exp()
        else:
            factors = places.new_ones(1, 1, 1, 1)
        angles = 2 * math.pi * factors * places.unsqueeze(-1) / self.periods  # (blocks, T, 2, d / 4)
        angles = angles.flatten(2).repeat(1, 1, 2)
        return torch.stack([angles.sin(), angles.cos()])


def rotated(x: Tensor, waves: Tensor) -> Tensor:
    """The last T tokens of x (B, heads, tokens, d), turned by `waves` (2, T, d); those before them stay as they are."""
    sine, cosine = waves.to(x.dtype)
    before, patches = x.tensor_split([x.shape[2] - len(sine)], dim=2)
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([before, turned], dim=2)


def turn_off(network: nn.Module) -> None:
    """Makes the parts of a network draw nothing."""
    for module in network.modules():
        if isinstance(module, Stochastic):
            module.draws = False
