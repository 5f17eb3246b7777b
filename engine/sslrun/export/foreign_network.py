"""Which network a foreign checkpoint's tensors belong to, deduced from their (our) names and their shapes."""

import math
import re
from collections.abc import Mapping

import torch
from torch import nn

from sslrun.errors import UsageError
from sslrun.export.architecture import Architecture, ResNetArchitecture, VitArchitecture
from sslrun.nn.resnet import STAGE_BLOCKS, ResNet
from sslrun.nn.vit import VisionTransformer


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

    The number of a transformer's heads is not in the shapes; heads are assumed to be 64 wide. Of a 3x3 stem the shapes
    do not say whether it strides and whether a max-pool follows; it is taken for "small".

    Raises:
        UsageError: they belong to no network that we have.
    """
    try:
        return _vit(shapes) if "cls_token" in shapes else _resnet(shapes)
    except UsageError:
        raise
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"these are not the weights of a ResNet or a VisionTransformer ({error})") from error


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
    if not is_deep:
        return ResNetArchitecture(depths[0], in_channels, stem, base_width, stages=stages)
    inner, per_group, _, _ = shapes["layer1.0.conv2.weight"]
    groups = inner // per_group
    return ResNetArchitecture(depths[0], in_channels, stem, base_width, groups, per_group * 64 // base_width, stages)


def _vit(shapes: Mapping[str, tuple[int, ...]]) -> VitArchitecture:
    width = shapes["cls_token"][-1]
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    _, in_channels, patch_size, _ = shapes["patch_embed.proj.weight"]
    patches = shapes["pos_embed"][1] - 1 if "pos_embed" in shapes else (224 // patch_size) ** 2
    grid = math.isqrt(patches)
    if grid**2 != patches:
        raise UsageError(f"pos_embed has {patches + 1} places, which are not a class token and a square of patches")
    mlp_ratio = shapes["blocks.0.mlp.fc1.weight"][0] / width
    heads = max(1, width // 64)
    return VitArchitecture(width, depth, heads, grid * patch_size, patch_size, in_channels, mlp_ratio)
