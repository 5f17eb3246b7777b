"""The architecture of an encoder, read from the recipe's `[model.backbone]` table."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from torch import Tensor

from sslrun.nn.vit import MLP_RATIOS, SIZES

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ResNetArchitecture:
    """A ResNet; the fields are arguments of `sslrun.nn.resnet.ResNet`, `stages` is the number of stages that it has."""

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
        """The `[model.backbone]` table that builds it, without keys that have their defaults."""
        changed = _changed(self)
        last = {"out_indices": [changed.pop("stages")]} if "stages" in changed else {}
        return {"type": "ResNet", "depth": self.depth, **changed, **last}


@dataclass(frozen=True)
class VitArchitecture:
    """A vision transformer; the fields are arguments of `sslrun.nn.vit.VisionTransformer`."""

    embed_dim: int
    depth: int
    num_heads: int
    img_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    mlp_ratio: float = 4.0
    positions: str = "sine-cosine"
    registers: int = 0
    layer_scale: float = 0.0
    mlp: str = "gelu"
    norm_eps: float = 1e-6
    global_pool: str = "token"

    @property
    def is_plain(self) -> bool:
        """Whether it is the network of Dosovitskiy et al. 2021, which other libraries know as "vit"."""
        parts = self.registers, self.layer_scale, self.mlp, self.norm_eps
        return parts == (0, 0.0, "gelu", 1e-6) and self.positions != "rotary"

    def __str__(self) -> str:
        return f"ViT-{(self.arch or f'{self.embed_dim}x{self.depth}').capitalize()}/{self.patch_size}"

    @property
    def arch(self) -> str | None:
        """The name of the size with this width and depth, if it has one."""
        return next((arch for arch, (*size, _) in SIZES.items() if size == [self.embed_dim, self.depth]), None)

    def arguments(self) -> dict[str, Any]:
        """The `[model.backbone]` table that builds it, without keys that have their defaults."""
        arch, changed = self.arch, _changed(self)
        if arch is None:
            changed |= {"embed_dim": self.embed_dim, "depth": self.depth}
        if arch is not None and MLP_RATIOS[arch] != self.mlp_ratio:
            changed |= {"mlp_ratio": self.mlp_ratio}
        if arch is None or SIZES[arch][2] != self.num_heads:
            changed |= {"num_heads": self.num_heads}
        return {"type": "VisionTransformer", **({"arch": arch} if arch else {}), **changed}


Architecture = ResNetArchitecture | VitArchitecture


def architecture_of(table: Mapping[str, Any]) -> Architecture | None:
    """The network of a `[model.backbone]` table; None where it is neither a ResNet nor a VisionTransformer."""
    given = {key: value for key, value in table.items() if value is not None}
    if given.get("type") == "ResNet":
        given["stages"] = max(given.get("out_indices", [4]))
        return ResNetArchitecture(**{f.name: given[f.name] for f in fields(ResNetArchitecture) if f.name in given})
    if given.get("type") == "VisionTransformer":
        arch = given.get("arch", "small")
        sizes = dict(zip(("embed_dim", "depth", "num_heads"), SIZES[arch], strict=True))
        given = {**sizes, "mlp_ratio": MLP_RATIOS[arch], **given}
        return VitArchitecture(**{f.name: given[f.name] for f in fields(VitArchitecture) if f.name in given})
    return None


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """The name and shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _changed(architecture: Architecture) -> dict[str, Any]:
    """The fields that have a default and another value."""
    values = {field.name: (getattr(architecture, field.name), field.default) for field in fields(architecture)}
    return {name: value for name, (value, default) in values.items() if default not in (MISSING, value)}
