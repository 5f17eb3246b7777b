"""Which network a foreign checkpoint's tensors belong to, deduced from their (our) names and their shapes."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from sslrun.errors import UsageError
from sslrun.export.architecture import Architecture, ResNetArchitecture, VitArchitecture
from sslrun.nn.resnet import STAGE_BLOCKS, ResNet
from sslrun.nn.vit import VisionTransformer, grid_of, sine_cosine_positions

WAVES_TOLERANCE = 2e-2  # of sines and cosines that were stored in bfloat16

# Attention heads of vision transformers by width. Weights do not determine them; a wrong number gives wrong features.
HEADS = {
    192: 3,  # Ti: Touvron et al. 2021 (DeiT, arXiv 2012.12877), table 1
    384: 6,  # S: the same; the small one of MoCo v3 has 12
    512: 8,  # timm's vit_medium
    640: 10,  # timm's vit_betwixt
    768: 12,  # B: Dosovitskiy et al. 2021 (arXiv 2010.11929), table 1
    1024: 16,  # L: the same
    1152: 16,  # SO400m: Alabdulmohsin et al. 2023 (arXiv 2305.13035)
    1280: 16,  # H: Dosovitskiy et al.
    1408: 16,  # g: Zhai et al. 2022 (arXiv 2106.04560), table 2
    1536: 24,  # DINOv2's g: Oquab et al. 2023 (arXiv 2304.07193)
    1664: 16,  # G: Zhai et al.
}
HEADS_OF_DINOV3 = {384: 6, 768: 12, 1024: 16, 1152: 18, 1280: 20, 1536: 24, 4096: 32}  # arXiv 2508.10104


def built(architecture: Architecture) -> nn.Module:
    """The backbone, on the meta device.

    Raises:
        UsageError: no network has these sizes.
    """
    keys = architecture.arguments()
    kind = {"ResNet": ResNet, "VisionTransformer": VisionTransformer}[keys.pop("type")]
    try:
        with torch.device("meta"):
            return kind(**keys)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"such a network cannot be built: {error}") from error


def deduce(shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """The network that tensors of these names and shapes belong to.

    The number of a transformer's heads is not in the shapes: it is that of published networks of its width, 0 where
    there is none. Of a 3x3 stem the shapes do not say whether it strides and whether a max-pool follows; it is taken
    for "small".

    Raises:
        UsageError: they belong to no network that we have.
    """
    try:
        return _vit(shapes) if is_transformer(shapes) else _resnet(shapes)
    except UsageError:
        raise
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"these are not the weights of a ResNet or a VisionTransformer ({error})") from error


def is_transformer(names: Iterable[str]) -> bool:
    """Whether these are the names of a transformer's tensors, with or without class token."""
    return any(name.startswith(("blocks.", "patch_embed.")) for name in names)


def _resnet(shapes: Mapping[str, tuple[int, ...]]) -> ResNetArchitecture:
    blocks = {tuple(map(int, m.groups())) for name in shapes if (m := re.match(r"layer(\d)\.(\d+)\.", name))}
    counts = tuple(sum(stage == s for s, _ in blocks) for stage in range(1, 5))
    stages = max((stage for stage, _ in blocks), default=0)
    is_deep = "layer1.0.conv3.weight" in shapes
    depths = [d for d, c in STAGE_BLOCKS.items() if c[:stages] == counts[:stages] and (d >= 50) == is_deep]
    if not depths or not stages:
        kind = "bottlenecks" if is_deep else "basic blocks"
        raise UsageError(
            f"a ResNet of {counts} {kind} in its stages is none of depth {', '.join(map(str, STAGE_BLOCKS))}"
        )
    base_width, in_channels, kernel, _ = shapes["conv1.weight"]
    stem = {7: "imagenet", 3: "small"}.get(kernel)
    if stem is None:
        raise UsageError(f"a ResNet whose first convolution is {kernel}x{kernel}, not 7x7 or 3x3, is none of ours")
    norms = [name.removesuffix(".weight") for name in shapes if re.fullmatch(r"(layer\d\.\d+\.)?bn\d\.weight", name)]
    if bare := [norm for norm in norms if f"{norm}.running_mean" not in shapes or f"{norm}.running_var" not in shapes]:
        raise UsageError(
            f"{bare[0]} of this ResNet has no running statistics: it is not a BatchNorm, as ours (a GroupNorm?)"
        )
    if not is_deep:
        return ResNetArchitecture(depths[0], in_channels, stem, base_width, stages=stages)
    inner, per_group, _, _ = shapes["layer1.0.conv2.weight"]
    groups = inner // per_group
    return ResNetArchitecture(depths[0], in_channels, stem, base_width, groups, per_group * 64 // base_width, stages)


def _vit(shapes: Mapping[str, tuple[int, ...]]) -> VitArchitecture:
    if "cls_token" not in shapes:
        raise UsageError(
            "this vision transformer has no class token (cls_token), as that of I-JEPA; the feature of ours is the "
            "output of its class token"
        )
    if "fc_norm.weight" in shapes:
        raise UsageError(
            "this vision transformer averages its patches and has its last norm behind that (fc_norm, global_pool = "
            '"avg"); the feature of ours is the normalized output of its class token'
        )
    if any(name.startswith("cls_norm.") for name in shapes):
        raise UsageError("this vision transformer has a norm of its own for the class token (cls_norm), ours has not")
    is_rotary = "rope_embed.periods" in shapes
    if "pos_embed" not in shapes and not is_rotary:
        raise UsageError(
            "this vision transformer has no pos_embed: its positions are of another kind (rotary, relative)"
        )
    block = {name.split(".", 2)[2].rpartition(".")[0] for name in shapes if name.startswith("blocks.0.")}
    if absent := [
        part for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2") if part not in block
    ]:
        others = sorted(block - {"norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"})
        instead = f", but {', '.join(others)}" if others else ""
        raise UsageError(f"the blocks of this vision transformer have no {absent[0]}, as ours have{instead}")
    width = shapes["cls_token"][-1]
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    _, in_channels, patch_size, _ = shapes["patch_embed.proj.weight"]
    patches = (224 // patch_size) ** 2 if is_rotary else shapes["pos_embed"][1] - 1  # rotary: any number
    grid = math.isqrt(patches)
    if grid**2 != patches:
        raise UsageError(f"pos_embed has {patches + 1} places, which are not a class token and a square of patches")
    hidden, inner = shapes["blocks.0.mlp.fc1.weight"][0], shapes["blocks.0.mlp.fc2.weight"][1]
    is_gated = hidden == 2 * inner
    hidden = inner * 3 // 2 if is_gated else hidden
    ratio = hidden / width
    if int(width * ratio) < hidden:  # by rounding
        ratio = math.nextafter(ratio, math.inf)
    is_scaled = "blocks.0.ls1.gamma" in shapes
    registers = shapes["reg_token"][1] if "reg_token" in shapes else 0
    heads = HEADS_OF_DINOV3.get(width, 0) if is_rotary else HEADS.get(width, 0)
    return VitArchitecture(
        width, depth, heads, grid * patch_size, patch_size, in_channels, ratio,
        positions="rotary" if is_rotary else "learned" if is_scaled or registers else "sine-cosine",
        registers=registers, layer_scale=1e-5 if is_scaled else 0.0, mlp="swiglu" if is_gated else "gelu",
        norm_eps=1e-5 if is_rotary else 1e-6,
    )  # fmt: skip


def order_of_waves(positions: Tensor) -> Literal["rows", "columns"] | None:
    """Whose fixed positional embeddings these are: sines and cosines of rows before those of columns are MoCo v3's, and
    of columns before those of rows MAE's and our own; None for learned ones."""
    grid = grid_of(positions)
    if grid is None or grid < 2 or positions.shape[2] % 4:
        return None
    columns_first = sine_cosine_positions(grid, positions.shape[2])
    rows_first = torch.cat(columns_first.chunk(2, dim=2)[::-1], dim=2)
    if torch.allclose(positions.float(), rows_first, atol=WAVES_TOLERANCE):
        return "rows"
    return "columns" if torch.allclose(positions.float(), columns_first, atol=WAVES_TOLERANCE) else None
