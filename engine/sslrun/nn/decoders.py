"""Decoders: networks from the visible patches' outputs to predictions for the hidden ones."""

import torch
from torch import Tensor, nn

from sslrun.config.component import Component
from sslrun.contract import PatchMask
from sslrun.nn.argument_checks import require_positive
from sslrun.nn.transformer import Block, Mlp
from sslrun.nn.vit import VisionTransformer, sine_cosine_positions, taken


class PatchDecoder(nn.Module, Component, kind="decoders"):
    """A network from the outputs of the visible patches to a prediction for each hidden patch.

    Attributes:
        out_channels: length of a prediction.
    """

    out_channels: int

    def require_patches_of(self, backbone: VisionTransformer) -> None:
        """Raises ValueError if it does not fit the tokens of the backbone."""
        raise NotImplementedError

    def forward(self, outputs: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Predictions for the hidden patches, (B, m, out_channels).

        Args:
            outputs: (B, 1 + registers + n, D), of class token, registers and the visible patches.
            visible: (B, n) int64, places of the visible patches.
            hidden: (B, m) int64, places of the hidden patches.
        """
        raise NotImplementedError


class MAEDecoder(PatchDecoder):
    """A small transformer; a learned token stands for each hidden patch (He et al. 2021, arXiv 2111.06377, section 3).

    Args:
        in_channels: width of the backbone.
        img_size: height and width of the images in pixels.
        patch_size: height and width of a patch in pixels.
        img_channels: channels of the images.
        embed_dim: width of the decoder.
        depth: number of blocks.
        num_heads: number of attention heads.
        mlp_ratio: hidden width of the MLPs divided by embed_dim.
    """

    def __init__(
        self,
        in_channels: int,
        img_size: int = 224,
        patch_size: int = 16,
        img_channels: int = 3,
        embed_dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, img_size=img_size, patch_size=patch_size, img_channels=img_channels)
        require_positive(embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        if img_size % patch_size:
            raise ValueError(f"patch_size is {patch_size}, which does not divide img_size {img_size}")
        if embed_dim % num_heads or embed_dim % 4:
            raise ValueError(f"embed_dim is {embed_dim}, expected a multiple of 4 and of num_heads, {num_heads}")
        self.in_channels, self.img_size, self.patch_size = in_channels, img_size, patch_size
        self.out_channels = patch_size**2 * img_channels
        self.decoder_embed = nn.Linear(in_channels, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        table = sine_cosine_positions(img_size // patch_size, embed_dim)
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        hidden = int(embed_dim * mlp_ratio)
        self.decoder_blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, hidden, Mlp, 0.0, 1e-6) for _ in range(depth))
        )
        self.decoder_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(embed_dim, self.out_channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def require_patches_of(self, backbone: VisionTransformer) -> None:
        own = (self.in_channels, self.img_size, self.patch_size)
        theirs = (backbone.num_features, backbone.img_size, backbone.patch_size)
        if own != theirs:
            names = "in_channels, img_size and patch_size of the decoder"
            raise ValueError(f"{names} are {own}, but the backbone has {theirs}")

    def forward(self, outputs: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        embedded = self.decoder_embed(outputs)
        patches = embedded[:, embedded.shape[1] - visible.shape[1] :]
        first = self.decoder_pos_embed[:, :1] + embedded[:, :1]
        positions = self.decoder_pos_embed[:, 1:].expand(outputs.shape[0], -1, -1)
        # In the order class token, visible, hidden: attention and MLPs do not depend on the order of tokens.
        tokens = [first, patches + taken(positions, visible), self.mask_token + taken(positions, hidden)]
        decoded = self.decoder_norm(self.decoder_blocks(torch.cat(tokens, dim=1))[:, -hidden.shape[1] :])
        return self.decoder_pred(decoded)


class HiddenPatchHead(nn.Linear):
    """A linear layer from the output of each hidden patch to a prediction (SimMIM, MaskFeat).

    The backbone sees the mask token in the place of hidden patches. Initial weights are normal (truncated) with a
    standard deviation of 0.02, the biases 0.

    Args:
        backbone: the network whose outputs the head takes.
        out_channels: length of a prediction.

    Raises:
        ValueError: the backbone has no mask token, or does not return the outputs of patches.
    """

    def __init__(self, backbone: VisionTransformer, out_channels: int) -> None:
        super().__init__(backbone.num_features, out_channels)
        if backbone.mask_token is None or not backbone.patch_tokens:
            raise ValueError(
                "the backbone of a method that predicts hidden patches by one layer needs mask_token = "
                "true and patch_tokens = true"
            )
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def of_hidden(self, backbone: VisionTransformer, images: Tensor, mask: PatchMask) -> tuple[Tensor, Tensor]:
        """Predictions for the hidden patches (B, n, out_channels), and their places (B, n).

        Args:
            backbone: that of the constructor.
            images: (B, C, H, W).
            mask: hides n patches of each image.
        """
        _, hidden = mask.places()
        outputs = backbone(images, mask=mask.hidden)[0].flatten(2).transpose(1, 2)
        return self(taken(outputs, hidden)), hidden
