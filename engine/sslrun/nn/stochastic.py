"""Parts of a network that draw random numbers in training: stochastic depth and jittered rotary positions.

What they draw is a function of the run's seed, the step and the place in the global batch, so it depends neither on the
number of ranks nor on micro-batches (`runtime/network_draws.py`). Momentum encoders draw nothing, although they are in
training mode (for BatchNorm): `teacher_of` turns these parts off.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.randomness import as_uniform, mixed_
from sslrun.runtime.network_draws import Drawing


class Kept(NamedTuple):
    """The rows of a pass for which a residual branch is computed.

    Attributes:
        rows: (n,) int64.
        counts: (n,) bool, whether the branch counts for a row; None if it does for all.
        scale: factor of the branch, 1 / (1 - rate).
    """

    rows: Tensor
    counts: Tensor | None
    scale: float


class StochasticDepth(Drawing):
    """Residual branches that are computed for a random part of the samples alone, and count more for these.

    Stochastic depth (Huang et al. 2016, arXiv 1603.09382) by batch subset, as in DINOv2 (Oquab et al. 2023, arXiv
    2304.07193, section 5). The subset is drawn anew in each group of g = `data.samples_per_gpu` consecutive samples of
    a view: the branch is computed for the k = ceil(g (1 - rate)) samples of the group with the smallest random numbers,
    and the last of these counts with such a probability that g (1 - rate) count on average. The others save its time
    and memory. (DINOv2 draws among all samples of a pass, and rounds their number down.)

    Args:
        rates: for each branch, the share of the samples without it, 0 to below 1.
    """

    def __init__(self, rates: Sequence[float]) -> None:
        super().__init__()
        self.rates = list(rates)

    def forward(self, rows: int) -> list[Kept | None]:
        """What each branch is computed for in a pass of `rows` rows, view-major; None for all of them."""
        if not (self.is_drawing and any(self.rates)):
            return [None] * len(self.rates)
        size, strata = self.strata(rows)

        def count_to(n: int) -> Tensor:
            return torch.arange(n, device=strata.device)

        branches = mixed_(self.next_key() + count_to(len(self.rates)))
        numbers = mixed_(mixed_(branches.unsqueeze(1) + strata).unsqueeze(2) + count_to(size + 1))
        # (branches, groups, g) rows in a random order, and one more number for each group.
        orders = numbers[..., :size].argsort(dim=2) + size * count_to(len(strata)).unsqueeze(1)
        chances = as_uniform(numbers[..., size:])
        return [
            _kept(order, chance, rate) if rate else None
            for order, chance, rate in zip(orders, chances, self.rates, strict=True)
        ]


def _kept(order: Tensor, chance: Tensor, rate: float) -> Kept:
    """The first rows of each group, given rows in a random order (groups, g) and numbers in [0, 1) (groups, 1)."""
    wanted = round(order.shape[1] * (1 - rate), 6)
    computed = math.ceil(wanted)
    counts = None
    if wanted < computed:
        counts = F.pad(chance < wanted - (computed - 1), (computed - 1, 0), value=True).flatten()
    return Kept(order[:, :computed].flatten(), counts, 1 / (1 - rate))


def with_branch(x: Tensor, branch: Callable[[Tensor], Tensor], kept: Kept | None) -> Tensor:
    """x (B, ...) plus a branch, for the rows in `kept`; None for x + branch(x)."""
    if kept is None:
        return x + branch(x)
    computed = branch(x.index_select(0, kept.rows))
    if kept.counts is not None:
        computed = computed * kept.counts.view(-1, *[1] * (x.ndim - 1))
    return x.index_add(0, kept.rows, computed.to(x.dtype), alpha=kept.scale)


class RotaryPositions(Drawing):
    """Axial rotary positions, as in DINOv3 (Simeoni et al. 2025, arXiv 2508.10104): the numbers of a query and a key
    are turned in pairs by angles that grow with the patch's row and column.

    Coordinates of patch centers go from -1 to 1 along each side, whatever the number of patches: attention between two
    patches depends on the difference of their places alone. In training all coordinates of a block are multiplied by
    exp(U(-ln rescale, ln rescale)), drawn anew for each block and forward pass (so for each size of crops), and equal
    for the whole global batch.

    Args:
        head_width: numbers d of a head, a multiple of 4.
        blocks: number of blocks.
        rescale: largest factor of the coordinates in training, 1 for none.
        base: bound of the periods, which are base^(2 j / (d / 2)) for j < d / 4.
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
            numbers = mixed_(self.next_key() + torch.arange(self.blocks, device=places.device))
            drawn = as_uniform(numbers).to(places.dtype).view(-1, 1, 1, 1)
            factors = ((2 * drawn - 1) * most).exp()
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
        if isinstance(module, Drawing):
            module.draws = False
