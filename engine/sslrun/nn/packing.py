"""Tokens of images of several sizes in one tensor, and attention within each image of it.

Images of one size follow each other, and the tokens of an image: (N, D), no padding. All but attention computes one
token at a time, so it needs no more than that. Attention is one kernel over sequences of different lengths
(FlashAttention, Dao 2023, arXiv 2307.08691) where the device has it, as in DINOv2 (Oquab et al. 2023, arXiv 2304.07193,
section 5), and one call for each size otherwise. Results are equal but for rounding.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from sslrun.nn.stochastic import Kept, rotated


class Layout(NamedTuple):
    """How many images of how many tokens follow each other.

    Attributes:
        sizes: for each size, the number of images B and of tokens T of each.
        bounds: (images + 1,) int32, first token of each image, and their number N.
    """

    sizes: tuple[tuple[int, int], ...]
    bounds: Tensor

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, int]], device: torch.device) -> "Layout":
        """The layout of B images of T tokens for each (B, T)."""
        starts = itertools.accumulate((images * tokens for images, tokens in sizes), initial=0)
        parts = [
            start + tokens * torch.arange(images + (number == len(sizes)), dtype=torch.int32, device=device)
            for number, ((images, tokens), start) in enumerate(zip(sizes, starts, strict=False), 1)
        ]
        return cls(tuple(sizes), torch.cat(parts))

    def split(self, x: Tensor) -> list[Tensor]:
        """The images of each size, (B, T, ...), of packed tokens (N, ...)."""
        parts = x.split([images * tokens for images, tokens in self.sizes])
        return [part.unflatten(0, size) for part, size in zip(parts, self.sizes, strict=True)]

    def rotated(self, x: Tensor, waves: Sequence[Tensor]) -> Tensor:
        """Queries or keys (N, heads, d), turned by the `waves` of each size, as in `sslrun.nn.stochastic.rotated`."""
        return torch.cat([
            rotated(part.transpose(1, 2), own).transpose(1, 2).flatten(0, 1)
            for part, own in zip(self.split(x), waves, strict=True)
        ])  # fmt: skip


def has_varlen_attention(images: Tensor) -> bool:
    """Whether a network of these images computes attention by the kernel for different lengths: on CUDA, in half
    precision."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else images.dtype
    return images.is_cuda and dtype in (torch.bfloat16, torch.float16)


def packed(tokens: Sequence[Tensor]) -> tuple[Tensor, Layout]:
    """Tokens (B, T, D) of each size as one tensor (N, D), and its layout."""
    layout = Layout.of([(each.shape[0], each.shape[1]) for each in tokens], tokens[0].device)
    return torch.cat([each.flatten(0, 1) for each in tokens]), layout


def kept_tokens(kept: Sequence[Kept | None], layout: Layout) -> tuple[Kept | None, Layout]:
    """The tokens for which a branch is computed, and how they lie.

    Args:
        kept: the images of each size for which it is computed; all of them None for all images.
        layout: of all tokens.
    """
    chosen = [each for each in kept if each is not None]
    if not chosen:
        return None, layout
    rows, counts, sizes, start = [], [], [], 0
    for (images, tokens), each in zip(layout.sizes, chosen, strict=True):
        places = torch.arange(tokens, device=each.rows.device)
        rows.append((start + each.rows.unsqueeze(1) * tokens + places).flatten())
        counted = torch.ones_like(each.rows, dtype=torch.bool) if each.counts is None else each.counts
        counts.append(counted.repeat_interleave(tokens))
        sizes.append((len(each.rows), tokens))
        start += images * tokens
    count = None if all(each.counts is None for each in chosen) else torch.cat(counts)
    return Kept(torch.cat(rows), count, chosen[0].scale), Layout.of(sizes, layout.bounds.device)


def attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Attention of each image's tokens to those of the same image, (N, heads, d).

    Args:
        query: (N, heads, d), as `key` and `value`.
        layout: of the tokens.
    """
    if has_varlen_attention(query) and query.shape[2] % 8 == 0 and query.shape[2] <= 256:
        longest = max(tokens for _, tokens in layout.sizes)
        output = varlen_attn(query, key, value, layout.bounds, layout.bounds, longest, longest)
        assert isinstance(output, Tensor)
        return output
    triples = zip(*(layout.split(each) for each in (query, key, value)), strict=True)
    return torch.cat([
        F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in triple)).transpose(1, 2).flatten(0, 1)
        for triple in triples
    ])  # fmt: skip
