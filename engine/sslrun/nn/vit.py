"""Vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), parameter names as in timm, without the classifier.

Initialized as in MoCo v3 (Chen, Xie & He 2021, arXiv 2104.02057, section 4): fixed 2-D sine-cosine positional
embeddings, and a patch projection that keeps its random initial weights, which makes training more stable.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.config.annotations import DefaultOf
from sslrun.contract import Backbone
from sslrun.nn.argument_checks import require_positive
from sslrun.nn.precision import wide

# width D, blocks, heads; MoCo v3's small one has 12 heads, not 6.
SIZES = {"tiny": (192, 12, 12), "small": (384, 12, 12), "base": (768, 12, 12), "large": (1024, 24, 16)}


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each with a norm before it and a residual connection around it."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Images (B, 3, H, W) to tokens (B, T, D), row by row."""

    def __init__(self, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(Backbone):
    """Vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929); its feature is the class token's output (B, D).

    Parameter names are timm's. As in MoCo v3 (arXiv 2104.02057), positional embeddings are fixed sines and cosines.

    Args:
        arch: network size: "tiny" (width 192), "small" (384), "base" (768) or "large" (1024). As in MoCo v3, "tiny" and
            "small" have 12 attention heads.
        img_size: height and width of the images in pixels.
        patch_size: height and width of a patch in pixels; must divide img_size.
        in_channels: channels of the input images.
        embed_dim: width D of the tokens; by default that of arch.
        depth: number of blocks; by default that of arch.
        num_heads: number of attention heads; by default that of arch.
        mlp_ratio: hidden width of the MLPs divided by D.
        frozen_patch_embed: whether the patch projection keeps its random initial weights, which makes training more
            stable.
    """

    def __init__(
        self,
        arch: Literal["tiny", "small", "base", "large"] = "small",
        img_size: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dim: Annotated[int | None, DefaultOf("arch", {name: size[0] for name, size in SIZES.items()})] = None,
        depth: Annotated[int | None, DefaultOf("arch", {name: size[1] for name, size in SIZES.items()})] = None,
        num_heads: Annotated[int | None, DefaultOf("arch", {name: size[2] for name, size in SIZES.items()})] = None,
        mlp_ratio: float = 4.0,
        frozen_patch_embed: bool = True,
    ) -> None:
        super().__init__()
        width, blocks, heads = SIZES[arch]
        width, blocks, heads = embed_dim or width, depth or blocks, num_heads or heads
        require_positive(img_size=img_size, patch_size=patch_size, in_channels=in_channels, embed_dim=width)
        require_positive(depth=blocks, num_heads=heads)
        if img_size % patch_size:
            raise ValueError(f"patch_size is {patch_size}, which does not divide img_size {img_size}")
        if width % heads or width % 4:
            raise ValueError(f"embed_dim is {width}, expected a multiple of 4 and of num_heads, {heads}")
        self.num_features = width
        self.img_size, self.patch_size = img_size, patch_size
        self.patch_embed = PatchEmbed(in_channels, patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sine_cosine_positions(img_size // patch_size, width), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(width, heads, mlp_ratio) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self._initialize(in_channels * patch_size**2)
        self.patch_embed.requires_grad_(not frozen_patch_embed)

    def forward(self, images: Tensor) -> list[Tensor]:
        if images.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(f"images of {tuple(images.shape[-2:])} px, but img_size is {self.img_size}")
        tokens = torch.cat([self.cls_token.expand(images.shape[0], -1, -1), self.patch_embed(images)], dim=1)
        return [self.norm(self.blocks(tokens + self.pos_embed))[:, 0]]

    def layers(self) -> list[list[str]]:
        blocks = [[f"blocks.{number}"] for number in range(len(self.blocks))]
        return [["cls_token", "pos_embed", "patch_embed"], *blocks]

    def branches(self) -> list[nn.Module]:
        return [branch for module in self.blocks for branch in (module.attn, module.mlp)]  # type: ignore[misc]

    def _initialize(self, patch_numbers: int) -> None:
        """Xavier uniform; the patch projection counts as one matrix, query, key and value as three."""
        width = self.num_features
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Attention):
                bound = math.sqrt(6 / (width + width))
                nn.init.uniform_(module.qkv.weight, -bound, bound)
        bound = math.sqrt(6 / (patch_numbers + width))
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.cls_token, std=1e-6)


def sine_cosine_positions(grid: int, width: int, temperature: float = 10000.0) -> Tensor:
    """(1, 1 + grid^2, D): zeros for the class token; for each patch D/4 sines and D/4 cosines of its column, then of
    its row, at frequencies temperature^(-4k/D)."""
    frequency = temperature ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.flatten().double().unsqueeze(1) * frequency for place in (column, row)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=table.dtype), table]).unsqueeze(0).float()


def grid_of(positions: Tensor) -> int | None:
    """The number of patches along one side, of positional embeddings (1, 1 + grid^2, D); None for any other shape."""
    if positions.dim() != 3 or positions.shape[0] != 1 or positions.shape[1] < 2:
        return None
    grid = math.isqrt(positions.shape[1] - 1)
    return grid if 1 + grid**2 == positions.shape[1] else None


def resized_positions(positions: Tensor, grid: int) -> Tensor:
    """Positional embeddings (1, 1 + g^2, D), class token first, for another grid of patches: (1, 1 + grid^2, D).

    Those of the patches are interpolated bicubically, without antialiasing; that of the class token is kept. It is what
    MAE (He et al. 2022, arXiv 2111.06377) and DINOv2 (Oquab et al. 2023, arXiv 2304.07193, with an offset of 0) do.
    """
    own = grid_of(positions)
    assert own is not None, tuple(positions.shape)
    patches = wide(positions[:, 1:]).unflatten(1, (own, own)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([wide(positions[:, :1]), patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
