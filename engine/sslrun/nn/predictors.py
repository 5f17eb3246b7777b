"""Predictors: networks from the visible patches' outputs to those that a teacher gives the hidden ones."""

import torch
from torch import Tensor, nn

from sslrun.nn.argument_checks import require_positive
from sslrun.nn.decoders import PatchDecoder
from sslrun.nn.transformer import Block, Mlp, divide_branches
from sslrun.nn.vit import VisionTransformer, sine_cosine_positions, taken


class IJEPAPredictor(PatchDecoder):
    """A narrow transformer; a learned token stands for each patch to predict (Assran et al. 2023, arXiv 2301.08243,
    section 3 and appendix A).

    Weights begin with a standard deviation of 0.02, those of the l-th block's last layers divided by sqrt(2 l).

    Args:
        in_channels: width of the backbone.
        img_size: height and width of the images in pixels.
        patch_size: height and width of a patch in pixels.
        embed_dim: width of the predictor.
        depth: number of blocks.
        num_heads: number of attention heads, in the paper as many as the backbone's.
        mlp_ratio: hidden width of the MLPs divided by embed_dim.
    """

    def __init__(
        self,
        in_channels: int,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, img_size=img_size, patch_size=patch_size, embed_dim=embed_dim)
        require_positive(depth=depth, num_heads=num_heads)
        if img_size % patch_size:
            raise ValueError(f"patch_size is {patch_size}, which does not divide img_size {img_size}")
        if embed_dim % num_heads or embed_dim % 4:
            raise ValueError(f"embed_dim is {embed_dim}, expected a multiple of 4 and of num_heads, {num_heads}")
        self.in_channels, self.img_size, self.patch_size = in_channels, img_size, patch_size
        self.out_channels = in_channels
        self.predictor_embed = nn.Linear(in_channels, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        table = sine_cosine_positions(img_size // patch_size, embed_dim)[:, 1:]
        self.predictor_pos_embed = nn.Parameter(table, requires_grad=False)
        hidden = int(embed_dim * mlp_ratio)
        self.predictor_blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, hidden, Mlp, 0.0, 1e-6) for _ in range(depth))
        )
        self.predictor_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.predictor_proj = nn.Linear(embed_dim, in_channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        divide_branches(self.predictor_blocks)

    def require_patches_of(self, backbone: VisionTransformer) -> None:
        own = (self.in_channels, self.img_size, self.patch_size)
        theirs = (backbone.num_features, backbone.img_size, backbone.patch_size)
        if own != theirs:
            names = "in_channels, img_size and patch_size of the predictor"
            raise ValueError(f"{names} are {own}, but the backbone has {theirs}")

    def forward(self, outputs: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        positions = self.predictor_pos_embed.expand(outputs.shape[0], -1, -1)
        patches = outputs[:, outputs.shape[1] - visible.shape[1] :]
        seen = self.predictor_embed(patches) + taken(positions, visible)
        tokens = torch.cat([seen, self.mask_token + taken(positions, hidden)], dim=1)
        return self.predictor_proj(self.predictor_norm(self.predictor_blocks(tokens)[:, -hidden.shape[1] :]))
