"""How other libraries name the tensors of a ResNet and of a vision transformer. Our names are torchvision's and timm's.

`to_transformers` and `from_transformers` translate names for an export and back; `networks` finds the networks in a
foreign checkpoint whose names are known here.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Names = dict[str, str]  # their name, without the prefix of the network: our name

_VIT_TO_TRANSFORMERS = [
    (r"cls_token", r"embeddings.cls_token"),
    (r"pos_embed", r"embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embeddings.projection.\1"),
    (r"blocks\.(\d+)\.norm1\.(\w+)", r"encoder.layer.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2\.(\w+)", r"encoder.layer.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layer.\1.attention.output.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"encoder.layer.\1.intermediate.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"encoder.layer.\1.output.dense.\2"),
    (r"norm\.(\w+)", r"layernorm.\1"),
]
_MM_VIT = [  # MMSelfSup, mmcls and mmpretrain
    (r"patch_embed\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"layers\.(\d+)\.ln([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (r"layers\.(\d+)\.attn\.(\w+)\.(\w+)", r"blocks.\1.attn.\2.\3"),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.1\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"ln1\.(\w+)", r"norm.\1"),
]
_TORCHVISION_VIT = [
    (r"class_token", r"cls_token"),
    (r"conv_proj\.(\w+)", r"patch_embed.proj.\1"),
    (r"encoder\.pos_embedding", r"pos_embed"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(\w+)", r"blocks.\1.attn.qkv.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"encoder\.ln\.(\w+)", r"norm.\1"),
]


def to_transformers(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors of a ResNet or VisionTransformer under the names of a ResNetModel or ViTModel."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        theirs = _in_transformers(name)
        renamed |= zip(theirs, tensor.chunk(len(theirs)) if len(theirs) > 1 else [tensor], strict=True)
    return renamed


def from_transformers(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Tensors:
    """The inverse of `to_transformers`: the tensors under our `names`. KeyError: one is missing."""
    parts = {name: [tensors[own] for own in _in_transformers(name)] for name in names}
    return {name: torch.cat(own) if len(own) > 1 else own[0] for name, own in parts.items()}


def _in_transformers(name: str) -> list[str]:
    """The name of one of our tensors in transformers; three names if it is joined from query, key and value."""
    if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name):
        prefix = f"encoder.layer.{match[1]}.attention.attention"
        return [f"{prefix}.{part}.{match[2]}" for part in ("query", "key", "value")]
    is_resnet = name.startswith(("conv1.", "bn1.", "layer"))
    return [_resnet_to_transformers(name) if is_resnet else _renamed(name, _VIT_TO_TRANSFORMERS)]


def networks(names: Iterable[str]) -> dict[str, Names]:
    """The networks in a checkpoint: the prefix of each network's names, and its names without the prefix.

    Other tensors under a prefix (a classifier, a decoder) are among its names too.
    """
    names = list(names)
    by_prefix: dict[str, Names] = {}
    for anchor, layout in _LAYOUTS:
        for prefix in {match[1] for name in names if (match := re.fullmatch(rf"((?:.+\.)?){anchor}", name))}:
            below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            translated = layout(below)
            if {"conv1.weight", "patch_embed.proj.weight"} & set(translated.values()):
                by_prefix[prefix] = translated
    return by_prefix


def _resnet_to_transformers(name: str) -> str:
    match = re.fullmatch(r"(?:layer(\d)\.(\d+)\.)?(conv|bn|downsample\.)(\d)\.(\w+)", name)
    assert match is not None, name
    stage, block, kind, number, last = match.groups()
    place = "embedder.embedder" if stage is None else f"encoder.stages.{int(stage) - 1}.layers.{block}."
    if stage is not None:
        place += "shortcut" if kind == "downsample." else f"layer.{int(number) - 1}"
    is_convolution = kind == "conv" or (kind, number) == ("downsample.", "0")
    return f"{place}.{'convolution' if is_convolution else 'normalization'}.{last}"


def _renamed(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


def _torchvision_resnet(names: list[str]) -> Names:
    """Renames "shortcut", as lightly's own ResNet says, to torchvision's "downsample"."""
    return {name: re.sub(r"^(layer\d\.\d+\.)shortcut\.", r"\1downsample.", name) for name in names}


def _sequential_resnet(names: list[str]) -> Names:
    """Names of `nn.Sequential(*resnet.children())`: numbers, some of them of layers without weights."""
    parts: dict[int, str] = {}
    for number in sorted({int(name.split(".")[0]) for name in names if re.match(r"\d+\.", name)}):
        if f"{number}.0.conv1.weight" in names:
            parts[number] = f"layer{sum(part.startswith('layer') for part in parts.values()) + 1}"
        elif f"{number}.running_mean" in names:
            parts[number] = "bn1"
        elif not parts:
            parts[number] = "conv1"
    pairs = [(name, *name.partition(".")[::2]) for name in names if re.match(r"\d+\.", name)]
    plain = {name: f"{parts[int(number)]}.{rest}" for name, number, rest in pairs if int(number) in parts}
    return {name: _torchvision_resnet([own])[own] for name, own in plain.items()}


def _by_rules(rules: list[tuple[str, str]]) -> Callable[[list[str]], Names]:
    return lambda names: {name: _renamed(name, rules) for name in names}


_LAYOUTS: list[tuple[str, Callable[[list[str]], Names]]] = [
    (r"layer1\.0\.conv1\.weight", _torchvision_resnet),
    (r"\d+\.0\.conv1\.weight", _sequential_resnet),
    (r"blocks\.0\.attn\.qkv\.weight", _by_rules([])),
    (r"layers\.0\.attn\.qkv\.weight", _by_rules(_MM_VIT)),
    (r"encoder\.layers\.encoder_layer_0\.self_attention\.in_proj_weight", _by_rules(_TORCHVISION_VIT)),
]
