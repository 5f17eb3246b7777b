"""Vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), parameter names as in timm, without the classifier.

By its arguments it is that of MoCo v3, DINO, DINOv2 or DINOv3: class token, registers, fixed, learned or rotary
positions, LayerScale, an MLP with GELU or SwiGLU, stochastic depth, a mask token, images of any size.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.config.annotations import DefaultOf
from sslrun.contract import Backbone
from sslrun.nn.argument_checks import require_not_negative, require_positive, require_rate
from sslrun.nn.packing import kept_tokens, packed
from sslrun.nn.precision import wide
from sslrun.nn.stochastic import RotaryPositions, StochasticDepth
from sslrun.nn.transformer import Attention, Block, Blocks, Mlp, SwiGlu, divide_branches

# width D, blocks, heads; MoCo v3's small one has 12 heads, not 6 as DeiT's and DINO's. huge: Dosovitskiy et al.;
# so400m: Alabdulmohsin et al. 2023 (arXiv 2305.13035), with 4,304 numbers in its MLPs; giant: DINOv2's.
SIZES = {
    "tiny": (192, 12, 12),
    "small": (384, 12, 12),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "so400m": (1152, 27, 16),
    "huge": (1280, 32, 16),
    "giant": (1536, 40, 24),
}
MLP_RATIOS = {arch: 4304 / 1152 if arch == "so400m" else 4.0 for arch in SIZES}
FROZEN_PATCHES = {"sine-cosine": True, "learned": False, "rotary": False}
INITIALIZATIONS = {"sine-cosine": "mocov3", "learned": "dino", "rotary": "dino"}


class PatchEmbed(nn.Module):
    """Images (B, 3, H, W) to tokens (B, T, D), row by row."""

    def __init__(self, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(Backbone):
    """Vision transformer of the sizes Ti, S, B, L, SO400M, H and g (Dosovitskiy et al. 2021, arXiv 2010.11929); its
    feature (B, D) is the class token's output or the mean of the patches'.

    It takes images of any height and width that are multiples of patch_size. Parameter names are timm's.

    Args:
        arch: network size: "tiny" (width 192), "small" (384), "base" (768), "large" (1024), "so400m" (1152), "huge"
            (1280) or "giant" (1536, DINOv2's g). As in MoCo v3, "tiny" and "small" have 12 attention heads; those of
            DeiT and DINO have 3 and 6.
        img_size: height and width, in pixels, of images that need no interpolation of fixed or learned positions.
        patch_size: height and width of a patch in pixels; must divide img_size.
        in_channels: channels of the images.
        embed_dim: width D; by default that of arch.
        depth: number of blocks; by default that of arch.
        num_heads: number of attention heads; by default that of arch.
        mlp_ratio: hidden width of the MLPs divided by D; by default that of arch.
        frozen_patch_embed: whether the patch projection keeps its random initial weights, which makes training with
            fixed positions more stable (MoCo v3).
        positions: "sine-cosine" adds fixed sines and cosines, as in MoCo v3 and MAE; "learned" adds learned embeddings,
            as in DINO and DINOv2; "rotary" turns queries and keys, as in DINOv3.
        rotary_rescale: with rotary positions, largest factor of the coordinates in training; 1 for none. It is drawn
            for each block in each step, and for each size of crops.
        registers: number of learned tokens besides the class token, without a position (Darcet et al. 2024, arXiv
            2309.16588).
        layer_scale: initial factor of each channel of the residual branches (LayerScale); 0 for none.
        mlp: the MLPs: "gelu", or "swiglu" with two thirds of the hidden width, as in DINOv2's giant one.
        drop_path: share of the samples without the last block's branches in training; it rises linearly from 0 in the
            first block. The others save the time of the branch. They are drawn within each group of
            data.samples_per_gpu samples.
        drop_path_uniform: whether drop_path is the share in all blocks, as in DINOv2.
        initialization: initial weights: "mocov3" and "mae" are uniform (Xavier), with query, key and value as three
            matrices or as one (arXiv 2104.02057, 2111.06377); "dino" is normal, with a standard deviation of 0.02
            (arXiv 2104.14294); "ijepa" likewise, and the last layers of the l-th block's branches are divided by
            sqrt(2 l) (arXiv 2301.08243).
        norm_eps: number added to the variance in the norms; DINOv3's published networks have 1e-5.
        mask_token: whether there is a token that stands for masked patches.
        patch_tokens: whether a map of the patches' outputs, (B, D, H / patch_size, W / patch_size), is returned before
            the feature.
        global_pool: the feature: "token" is the class token's output, "avg" the mean of the patches' outputs.
    """

    pos_embed: nn.Parameter | None
    reg_token: nn.Parameter | None
    mask_token: nn.Parameter | None
    rope_embed: RotaryPositions | None

    def __init__(
        self,
        arch: Literal["tiny", "small", "base", "large", "so400m", "huge", "giant"] = "small",
        img_size: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dim: Annotated[int | None, DefaultOf("arch", {name: size[0] for name, size in SIZES.items()})] = None,
        depth: Annotated[int | None, DefaultOf("arch", {name: size[1] for name, size in SIZES.items()})] = None,
        num_heads: Annotated[int | None, DefaultOf("arch", {name: size[2] for name, size in SIZES.items()})] = None,
        mlp_ratio: Annotated[float | None, DefaultOf("arch", MLP_RATIOS)] = None,
        frozen_patch_embed: Annotated[bool | None, DefaultOf("positions", FROZEN_PATCHES)] = None,
        positions: Literal["sine-cosine", "learned", "rotary"] = "sine-cosine",
        rotary_rescale: float = 1.0,
        registers: int = 0,
        layer_scale: float = 0.0,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        drop_path: float = 0.0,
        drop_path_uniform: bool = False,
        initialization: Annotated[
            Literal["mocov3", "mae", "dino", "ijepa"] | None, DefaultOf("positions", INITIALIZATIONS)
        ] = None,
        norm_eps: float = 1e-6,
        mask_token: bool = False,
        patch_tokens: bool = False,
        global_pool: Literal["token", "avg"] = "token",
    ) -> None:
        super().__init__()
        width, blocks, heads = SIZES[arch]
        width, blocks, heads = embed_dim or width, depth or blocks, num_heads or heads
        require_positive(img_size=img_size, patch_size=patch_size, in_channels=in_channels, embed_dim=width)
        require_positive(depth=blocks, num_heads=heads)
        require_not_negative(registers=registers, layer_scale=layer_scale)
        require_rate(drop_path=drop_path)
        if img_size % patch_size:
            raise ValueError(f"patch_size is {patch_size}, which does not divide img_size {img_size}")
        if width % heads or width % 4:
            raise ValueError(f"embed_dim is {width}, expected a multiple of 4 and of num_heads, {heads}")
        if positions == "rotary" and width // heads % 4:
            raise ValueError(f"a head has {width // heads} numbers, expected a multiple of 4 for rotary positions")
        if not rotary_rescale >= 1:
            raise ValueError(f"rotary_rescale is {rotary_rescale}, expected 1 or more")
        self.num_features = width
        self.img_size, self.patch_size, self.patch_tokens = img_size, patch_size, patch_tokens
        self.global_pool = global_pool
        self.patch_embed = PatchEmbed(in_channels, patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if mask_token else None
        self.pos_embed, self.rope_embed = None, None
        if positions == "rotary":
            self.rope_embed = RotaryPositions(width // heads, blocks, rotary_rescale)
        else:
            table = sine_cosine_positions(img_size // patch_size, width)
            self.pos_embed = nn.Parameter(table, requires_grad=positions == "learned")
        layer = {"gelu": Mlp, "swiglu": SwiGlu}[mlp]
        hidden = int(width * (mlp_ratio or MLP_RATIOS[arch]))
        first = drop_path if drop_path_uniform else 0.0
        rates = torch.linspace(first, drop_path, blocks, device="cpu").tolist()
        self.stochastic_depth = StochasticDepth([rate for rate in rates for _ in range(2)])  # attention and MLP
        self.blocks = Blocks(*(Block(width, heads, hidden, layer, layer_scale, norm_eps) for _ in rates))
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        chosen = initialization or INITIALIZATIONS[positions]
        if chosen in ("dino", "ijepa"):
            self._initialize_as_dino()
            if chosen == "ijepa":
                nn.init.trunc_normal_(self.patch_embed.proj.weight, std=0.02)
                divide_branches(self.blocks)
        else:
            self._initialize_uniformly(in_channels * patch_size**2, is_mae=chosen == "mae")
        is_frozen = FROZEN_PATCHES[positions] if frozen_patch_embed is None else frozen_patch_embed
        self.patch_embed.requires_grad_(not is_frozen)

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        visible: Tensor | None = None,
        others: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """The feature (B, D), see global_pool; before it the map of the patches' outputs, if patch_tokens is set.

        Args:
            images: (B, C, H, W).
            mask: (B, T) bool, patches that the mask token stands for, row by row.
            visible: (B, n) int64, the only patches that the network sees. The result is then the outputs of class
                token, registers and these patches, (B, 1 + registers + n, D).
            others: images of other sizes, whose features, (B', D) for each size, follow in the result. All go through
                the network in one pass, see `sslrun.nn.packing`. Neither mask nor `visible` is theirs.

        Raises:
            ValueError: the images do not consist of whole patches, or there is no mask token, or positions are rotary
                and only some patches visible.
        """
        if not others:
            tokens, waves = self._embedded(images, mask, visible)
            outputs = self.norm(self.blocks(tokens, waves, self.stochastic_depth(tokens.shape[0])))
            return self._results(outputs, images, visible is not None)
        embedded = [self._embedded(images, mask, visible), *(self._embedded(each, None, None) for each in others)]
        x, layout = packed([tokens for tokens, _ in embedded])
        waves_of_sizes = [waves for _, waves in embedded if waves is not None] or None
        drawn = [self.stochastic_depth(tokens.shape[0]) for tokens, _ in embedded]
        branches = [kept_tokens(each, layout) for each in zip(*drawn, strict=True)]
        kept, layouts = [kept for kept, _ in branches], [inner for _, inner in branches]
        first, *rest = layout.split(self.norm(self.blocks(x, waves_of_sizes, kept, layouts)))
        own = self._results(first, images, visible is not None)
        return [*own, *(self._results(each, crops, False)[-1] for each, crops in zip(rest, others, strict=True))]

    def _embedded(self, images: Tensor, mask: Tensor | None, visible: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tokens (B, T, D) that the blocks see, and sines and cosines of rotary positions."""
        height, width = self._grid(images)
        patches = self.patch_embed(images)
        if mask is not None:
            if self.mask_token is None:
                raise ValueError("masked patches need mask_token = true")
            patches = torch.where(mask.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        tokens = torch.cat([self.cls_token.expand(images.shape[0], -1, -1), patches], dim=1)
        if self.pos_embed is not None:
            tokens = tokens + self._positions(height, width)
        if visible is not None:
            if self.rope_embed is not None:
                raise ValueError(
                    "a network that sees some patches alone needs positions that are added, not rotary ones"
                )
            tokens = torch.cat([tokens[:, :1], taken(tokens[:, 1:], visible)], dim=1)
        if self.reg_token is not None:
            tokens = torch.cat([tokens[:, :1], self.reg_token.expand(tokens.shape[0], -1, -1), tokens[:, 1:]], dim=1)
        return tokens, None if self.rope_embed is None else self.rope_embed(height, width)

    def _results(self, outputs: Tensor, images: Tensor, is_partial: bool) -> list[Tensor]:
        """What `forward` returns for the outputs (B, T, D) of all tokens, or of some if `is_partial`."""
        if is_partial:
            return [outputs]
        height, width = self._grid(images)
        patches = outputs[:, outputs.shape[1] - height * width :]
        feature = outputs[:, 0] if self.global_pool == "token" else patches.mean(dim=1)
        return [patches.transpose(1, 2).unflatten(2, (height, width)), feature] if self.patch_tokens else [feature]

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, rest_of_height = divmod(images.shape[-2], self.patch_size)
        width, rest_of_width = divmod(images.shape[-1], self.patch_size)
        if rest_of_height or rest_of_width or not height or not width:
            size = tuple(images.shape[-2:])
            raise ValueError(f"images of {size} px do not consist of patches of {self.patch_size} px (patch_size)")
        return height, width

    def layers(self) -> list[list[str]]:
        blocks = [[f"blocks.{number}"] for number in range(len(self.blocks))]
        tokens = [name for name in ("reg_token", "mask_token") if getattr(self, name) is not None]
        positions = [] if self.pos_embed is None else ["pos_embed"]
        return [["cls_token", *positions, "patch_embed", *tokens], *blocks]

    def branches(self) -> list[nn.Module]:
        return [branch for module in self.blocks for branch in (module.attn, module.mlp)]  # type: ignore[misc]

    def _positions(self, height: int, width: int) -> Tensor:
        """(1, 1 + T, D), interpolated if the grid of patches is not that of img_size."""
        assert self.pos_embed is not None
        own = self.img_size // self.patch_size
        return self.pos_embed if (height, width) == (own, own) else resized_positions(self.pos_embed, (height, width))

    def _initialize_uniformly(self, patch_numbers: int, is_mae: bool) -> None:
        """Xavier uniform; the patch projection counts as one matrix, query, key and value as three unless `is_mae`."""
        width = self.num_features
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in [] if is_mae else self.modules():
            if isinstance(module, Attention):
                bound = math.sqrt(6 / (width + width))
                nn.init.uniform_(module.qkv.weight, -bound, bound)
        bound = math.sqrt(6 / (patch_numbers + width))
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)
        for token in (self.cls_token, self.reg_token, self.mask_token if is_mae else None):
            if token is not None:
                nn.init.normal_(token, std=0.02 if is_mae else 1e-6)

    def _initialize_as_dino(self) -> None:
        """Truncated normal; the patch projection has torch's initial weights, the mask token is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.reg_token, self.pos_embed):
            if token is not None and token.requires_grad:  # sines and cosines stay
                nn.init.trunc_normal_(token, std=0.02)


def taken(tokens: Tensor, places: Tensor) -> Tensor:
    """Some of the tokens of each sample, (B, n, D).

    Args:
        tokens: (B, T, D).
        places: (B, n) int64.
    """
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


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


def resized_positions(positions: Tensor, grid: int | tuple[int, int]) -> Tensor:
    """Positional embeddings (1, 1 + g^2, D), class token first, for another grid: (1, 1 + rows * columns, D).

    Those of the patches are interpolated bicubically, without antialiasing; that of the class token is kept. It is what
    MAE (He et al. 2022, arXiv 2111.06377) and DINOv2 (Oquab et al. 2023, arXiv 2304.07193, with an offset of 0) do.

    Args:
        positions: the embeddings of a square grid.
        grid: rows and columns of the new grid; one number for a square.
    """
    own = grid_of(positions)
    assert own is not None, tuple(positions.shape)
    size = (grid, grid) if isinstance(grid, int) else grid
    patches = wide(positions[:, 1:]).unflatten(1, (own, own)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size, mode="bicubic", align_corners=False)
    return torch.cat([wide(positions[:, :1]), patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
