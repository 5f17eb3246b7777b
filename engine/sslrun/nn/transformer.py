"""Blocks of a transformer: attention and an MLP, each with a norm before it and a residual connection around it.

Parameter names are timm's.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.nn.packing import Layout, attention
from sslrun.nn.stochastic import Kept, rotated, with_branch

Waves = Tensor | Sequence[Tensor] | None


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, waves: Waves = None, layout: Layout | None = None) -> Tensor:
        """The output, shaped like x: (B, T, D), or (N, D) of packed tokens, whose `layout` is given, and whose `waves`
        are one tensor for each size."""
        if layout is not None:
            assert not isinstance(waves, Tensor)
            query, key, value = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)
            if waves is not None:
                query, key = layout.rotated(query, waves), layout.rotated(key, waves)
            return self.proj(attention(query, key, value, layout).flatten(1))
        assert waves is None or isinstance(waves, Tensor)
        query, key, value = self.heads_of(x, waves)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).flatten(2))

    def heads_of(self, x: Tensor, waves: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, heads, T, D / heads); the first two turned by `waves`, as in `rotated`."""
        batch, tokens, _ = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        if waves is not None:
            query, key = rotated(query, waves), rotated(key, waves)
        return query, key, value


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    """Linear, SiLU of the first half times the second, linear (Shazeer 2020, arXiv 2002.05202). As in DINOv2 a third of
    the hidden width is left out, which makes up for the third matrix; it is rounded up to a multiple of 8."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (Touvron et al. 2021, arXiv 2103.17239)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention and MLP, each with a norm before it and a residual connection around it."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        mlp: Callable[[int, int], nn.Module],
        layer_scale: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = mlp(width, hidden)
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()

    def forward(
        self,
        x: Tensor,
        waves: Waves = None,
        kept: Sequence[Kept | None] = (None, None),
        layout: Layout | None = None,
    ) -> Tensor:
        """x (B, T, D), or packed tokens (N, D); `layout` is that of the tokens for which attention is computed."""
        x = with_branch(x, lambda rows: self.ls1(self.attn(self.norm1(rows), waves, layout=layout)), kept[0])
        return with_branch(x, lambda rows: self.ls2(self.mlp(self.norm2(rows))), kept[1])


class Blocks(nn.Sequential):
    """Blocks one after another."""

    def forward(
        self,
        x: Tensor,
        waves: Waves = None,
        kept: Sequence[Kept | None] | None = None,
        layouts: Sequence[Layout] | None = None,
    ) -> Tensor:
        """The output, shaped like x.

        Args:
            x: (B, T, D), or packed tokens (N, D).
            waves: from `RotaryPositions`; of packed tokens for each size.
            kept: two for each block, from `StochasticDepth` or `kept_tokens`.
            layouts: of packed tokens, two for each block, from `kept_tokens`.
        """
        kept = kept or [None] * 2 * len(self)
        for number, block in enumerate(self):
            layout = None if layouts is None else layouts[2 * number]
            x = block(x, _of_block(waves, number), kept[2 * number : 2 * number + 2], layout)
        return x


def _of_block(waves: Waves, number: int) -> Waves:
    """Sines and cosines (2, T, d) of a block, of those from `RotaryPositions`, or of those of each size."""
    if waves is None or isinstance(waves, Tensor):
        return None if waves is None else waves[:, min(number, waves.shape[1] - 1)]
    return [each[:, min(number, each.shape[1] - 1)] for each in waves]


def divide_branches(blocks: nn.Sequential) -> None:
    """Divides the last layers of the branches of the l-th block, counted from 1, by sqrt(2 l) (I-JEPA: Assran et al.
    2023, arXiv 2301.08243, after BEiT)."""
    for number, block in enumerate(blocks, 1):
        for name in ("attn.proj", "mlp.fc2"):
            layer = block.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            with torch.no_grad():
                layer.weight.div_(math.sqrt(2 * number))
