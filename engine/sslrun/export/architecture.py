"""Which network a set of weights is of, read from the names (ours) and the shapes of its tensors."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sslrun.errors import UsageError
from sslrun.nn.resnet import STAGE_BLOCKS, ResNet
from sslrun.nn.vit import SIZES, VisionTransformer

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ResNetShape:
    """What tells one ResNet from another; the fields are arguments of `sslrun.nn.resnet.ResNet`.

    A stem of 3x3 is "small": whether it strides, and whether a max-pool follows, no weight tells.
    """

    depth: int
    in_channels: int = 3
    stem: str = "imagenet"
    base_width: int = 64
    groups: int = 1
    width_per_group: int = 64
    stages: int = 4

    def __str__(self) -> str:
        kind = "ResNeXt" if self.groups > 1 else "ResNet"
        parts = [f"{key} = {value}" for key, value in self.arguments().items() if key not in ("type", "depth")]
        return ", ".join([f"{kind}-{self.depth}", *parts])

    def arguments(self) -> dict[str, Any]:
        """The `[model.backbone]` table that builds it, without what is default there."""
        last = {} if self.stages == 4 else {"out_indices": [self.stages]}
        defaults = ResNetShape(self.depth)
        names = ("in_channels", "stem", "base_width", "groups", "width_per_group")
        changed = {name: value for name in names if (value := getattr(self, name)) != getattr(defaults, name)}
        return {"type": "ResNet", "depth": self.depth, **changed, **last}


@dataclass(frozen=True)
class VitShape:
    """What tells one vision transformer from another; the fields are arguments of `sslrun.nn.vit.VisionTransformer`."""

    embed_dim: int
    depth: int
    num_heads: int
    img_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    mlp_ratio: float = 4.0

    def __str__(self) -> str:
        return f"ViT-{(self.arch or f'{self.embed_dim}x{self.depth}').capitalize()}/{self.patch_size}"

    @property
    def arch(self) -> str | None:
        """The name of the size with this width and depth, if it has one."""
        return next((arch for arch, (*size, _) in SIZES.items() if size == [self.embed_dim, self.depth]), None)

    def arguments(self) -> dict[str, Any]:
        """The `[model.backbone]` table that builds it, without what is default there."""
        arch, defaults = self.arch, VitShape(0, 0, 0)
        names = ("img_size", "patch_size", "in_channels", "mlp_ratio")
        changed = {name: value for name in names if (value := getattr(self, name)) != getattr(defaults, name)}
        if arch is None:
            changed |= {"embed_dim": self.embed_dim, "depth": self.depth}
        if arch is None or SIZES[arch][2] != self.num_heads:
            changed |= {"num_heads": self.num_heads}
        return {"type": "VisionTransformer", **({"arch": arch} if arch else {}), **changed}


Shape = ResNetShape | VitShape


def built(shape: Shape) -> nn.Module:
    """The backbone, without storage."""
    keys = shape.arguments()
    kind = {"ResNet": ResNet, "VisionTransformer": VisionTransformer}[keys.pop("type")]
    try:
        with torch.device("meta"):
            return kind(**keys)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"such a network cannot be built: {error}") from error


def shapes_of(module: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def deduce(shapes: Mapping[str, tuple[int, ...]]) -> Shape:
    """The network that tensors of these names and shapes belong to. Heads of a transformer are taken to be 64 wide.

    Raises:
        UsageError: they are of no network that we have.
    """
    try:
        return _vit(shapes) if "cls_token" in shapes else _resnet(shapes)
    except UsageError:
        raise
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"these are not the weights of a ResNet or a VisionTransformer ({error})") from error


def _resnet(shapes: Mapping[str, tuple[int, ...]]) -> ResNetShape:
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
        return ResNetShape(depths[0], in_channels, stem, base_width, stages=stages)
    inner, per_group, _, _ = shapes["layer1.0.conv2.weight"]
    groups = inner // per_group
    return ResNetShape(depths[0], in_channels, stem, base_width, groups, per_group * 64 // base_width, stages)


def _vit(shapes: Mapping[str, tuple[int, ...]]) -> VitShape:
    width = shapes["cls_token"][-1]
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    _, in_channels, patch_size, _ = shapes["patch_embed.proj.weight"]
    patches = shapes["pos_embed"][1] - 1 if "pos_embed" in shapes else (224 // patch_size) ** 2
    grid = math.isqrt(patches)
    if grid**2 != patches:
        raise UsageError(f"pos_embed has {patches + 1} places, which are not a class token and a square of patches")
    mlp_ratio = shapes["blocks.0.mlp.fc1.weight"][0] / width
    heads = max(1, width // 64)
    return VitShape(width, depth, heads, grid * patch_size, patch_size, in_channels, mlp_ratio)
