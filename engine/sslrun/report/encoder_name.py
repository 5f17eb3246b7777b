"""What a recipe's encoder is: its name with what sets it apart, and its size."""

from dataclasses import dataclass
from typing import Any

from sslrun.allowed_imports import require_allowed
from sslrun.config import Config
from sslrun.errors import UsageError

# What sets networks of one class apart, with the default that goes without saying.
_RESNET = (("base_width", 64, "base width {}"), ("stem", "imagenet", "{} stem"), ("groups", 1, "{} groups"))
_TRANSFORMER = (
    ("embed_dim", None, "width {}"),
    ("depth", None, "{} blocks"),
    ("num_heads", None, "{} heads"),
    ("img_size", 224, "{} px"),
)


@dataclass(frozen=True)
class EncoderFacts:
    """Name and size of an encoder.

    Attributes:
        name: such as "ResNet-18, base width 24, small stem".
        num_parameters: number of its parameters, without those of the method; None if it cannot be built.
        num_features: number of features of an image; None if it cannot be built.
    """

    name: str
    num_parameters: int | None
    num_features: int | None


def encoder_facts(config: Config | None) -> EncoderFacts:
    """Name and size of a recipe's encoder, which is built without its weights."""
    table = None if config is None else config.values.get("model", {}).get("backbone")
    if config is None or not isinstance(table, dict):
        return EncoderFacts("–", None, None)
    name = encoder_name(table)
    try:
        require_allowed(config, is_for_training=False)
        import torch

        from sslrun.contract import Backbone

        with torch.device("meta"):
            backbone: Backbone = config.build(Backbone, "model.backbone")
        num_parameters = sum(each.numel() for each in backbone.parameters())
        return EncoderFacts(name, num_parameters, backbone.num_features)
    except (UsageError, OSError, RuntimeError, ImportError):
        return EncoderFacts(name, None, None)


_SHORT = {"giant": "g", "so400m": "SO400m"}


def encoder_name(table: dict[str, Any]) -> str:
    """The encoder of a table [model.backbone], such as "ResNet-50" and "ViT-S/16, 96 px"."""
    kind = str(table.get("type", "–"))
    if kind == "ResNet":
        return _with_details(f"ResNet-{table.get('depth', '?')}", table, _RESNET)
    if kind == "VisionTransformer":
        own = any(table.get(key) is not None for key in ("embed_dim", "depth", "num_heads"))
        arch = str(table.get("arch", "small"))
        size = "" if own else f"-{_SHORT.get(arch, arch[0].upper())}"
        return _with_details(f"ViT{size}/{table.get('patch_size', 16)}", table, _TRANSFORMER)
    if isinstance(table.get("backbone"), dict):  # a network behind a fixed filter
        return f"{kind} + {encoder_name(table['backbone'])}"
    named = table.get("name") or table.get("arch") or table.get("depth")
    return kind if named is None else f"{kind} {named}"


def _with_details(name: str, table: dict[str, Any], details: tuple[tuple[str, Any, str], ...]) -> str:
    parts = [form.format(table[key]) for key, usual, form in details if table.get(key, usual) != usual]
    return ", ".join([name, *parts])
