"""How other libraries name the tensors of a ResNet and of a vision transformer. Our names are torchvision's and timm's.

`to_transformers` and `from_transformers` translate names for an export and back; `networks` finds the networks in a
foreign checkpoint whose names are known here, once `with_joined_attention` and `with_our_parts` have joined what ours
has in one tensor.
"""

import math
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


_TRANSFORMERS_VIT = [  # the inverse of _VIT_TO_TRANSFORMERS; query, key and value are joined
    (r"embeddings\.cls_token", r"cls_token"),
    (r"embeddings\.position_embeddings", r"pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.(\w+)", r"blocks.\1.norm2.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.qkv\.(\w+)", r"blocks.\1.attn.qkv.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"layernorm\.(\w+)", r"norm.\1"),
    (r"encoder\.layer\.(\d+)\.(.+)", r"blocks.\1.\2"),  # of other networks than ours
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


def with_joined_attention(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors of a checkpoint, with query, key and value of each layer of transformers joined under "qkv"."""
    joined: Tensors = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\battention\.attention\.)(query|key|value)(\.\w+)", name)
        names = [f"{match[1]}{part}{match[3]}" for part in ("query", "key", "value")] if match else []
        parts = [tensors[part] for part in names if part in tensors]
        if match is None or len(parts) < 3 or not all(_joins(part, tensor) for part in parts):
            joined[name] = tensor
        elif match[2] == "query":
            joined[f"{match[1]}qkv{match[3]}"] = torch.cat(parts)
    return joined


def with_our_parts(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors of a checkpoint, those of DINOv2's, DINOv3's and timm's transformers in our form.

    Registers are `reg_token`; the first two matrices of a SwiGLU are one; what a mask takes from the bias of queries,
    keys and values is 0; positions without a place for the class token, as timm's beside registers, get a place of 0.
    """
    ours: Tensors = {}
    for name, tensor in tensors.items():
        mask = tensors.get(f"{name}_mask") if name.endswith(".qkv.bias") else None
        if (match := re.fullmatch(r"(.*\.mlp\.)(w\d+)(\.\w+)", name)) is not None:
            ours |= _gated(tensors, name, *match.groups())
        elif mask is not None and mask.shape == tensor.shape and mask.layout == tensor.layout == torch.strided:
            ours[name] = tensor.masked_fill(mask == 0, 0)
        elif not name.endswith(".qkv.bias_mask"):
            ours[re.sub(r"(?<!embeddings\.)\b(register_tokens|storage_tokens)$", "reg_token", name)] = tensor
    for name in [name for name in ours if re.fullmatch(r"(.*\.)?pos_embed", name)]:
        positions, has_registers = ours[name], f"{name.removesuffix('pos_embed')}reg_token" in ours
        if has_registers and positions.dim() == 3 and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1] > 1:
            first = positions[:, :1]
            if _joins(positions, first.expand_as(positions)):
                ours[name] = torch.cat([torch.zeros_like(first), positions], dim=1)
    return ours


def _gated(tensors: Mapping[str, Tensor], name: str, place: str, part: str, kind: str) -> Tensors:
    """A tensor of a SwiGLU by our name: w12 and w3 of DINOv2 are fc1 and fc2, w1 and w2 of DINOv3 together fc1. What is
    no SwiGLU by its shapes keeps its names."""
    whole, last = tensors.get(f"{place}w12.weight"), tensors.get(f"{place}w3.weight")
    first, second = tensors.get(f"{place}w1{kind}"), tensors.get(f"{place}w2{kind}")
    has_whole = whole is not None and last is not None and whole.shape[:1] == (2 * last.shape[-1],)
    if part == "w12" and has_whole:
        return {f"{place}fc1{kind}": tensors[name]}
    if first is not None and second is not None and _joins(first, second):
        if part != "w3":
            return {f"{place}fc1{kind}": torch.cat([first, second])} if part == "w1" else {}
        return {f"{place}fc2{kind}": tensors[name]}
    return {f"{place}fc2{kind}" if part == "w3" and has_whole else name: tensors[name]}


def _joins(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors can be joined along their first dimension."""
    is_alike = (tensor.shape, tensor.dtype, tensor.layout) == (other.shape, other.dtype, other.layout)
    return is_alike and tensor.dim() > 0 and tensor.layout == torch.strided and not tensor.is_quantized


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


def modules_between_norm_and_layers(names: Names) -> int | None:
    """How many modules without weights a ResNet that was cut into `nn.Sequential` has between its first norm and its
    first stage; None for any other network.

    torchvision's has 2, ReLU and max-pool, and 1 without the max-pool. lightly's own ResNet, whose ReLU is a function
    and not a module, has 0: cut in this way it lost its first ReLU.
    """
    places = {own.split(".")[0]: name.split(".")[0] for name, own in names.items()}
    norm, first = places.get("bn1", ""), places.get("layer1", "")
    return int(first) - int(norm) - 1 if norm.isdecimal() and first.isdecimal() else None


def _transformers_resnet(names: list[str]) -> Names:
    """The inverse of `_resnet_to_transformers`."""

    def ours(name: str) -> str:
        if match := re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(\w+)", name):
            return f"{'conv1' if match[1] == 'convolution' else 'bn1'}.{match[2]}"
        match = re.fullmatch(
            r"encoder\.stages\.(\d)\.layers\.(\d+)\.(shortcut|layer\.(\d))\.(convolution|normalization)\.(\w+)", name
        )
        if match is None:
            return name
        stage, block, part, number, kind, last = match.groups()
        is_convolution = kind == "convolution"
        layer = f"{'conv' if is_convolution else 'bn'}{int(number or 0) + 1}"
        if part == "shortcut":
            layer = f"downsample.{0 if is_convolution else 1}"
        return f"layer{int(stage) + 1}.{block}.{layer}.{last}"

    return {name: ours(name) for name in names}


def _by_rules(rules: list[tuple[str, str]]) -> Callable[[list[str]], Names]:
    return lambda names: {name: _renamed(name, rules) for name in names}


_LAYOUTS: list[tuple[str, Callable[[list[str]], Names]]] = [
    (r"layer1\.0\.conv1\.weight", _torchvision_resnet),
    (r"\d+\.0\.conv1\.weight", _sequential_resnet),
    (r"blocks\.0\.attn\.qkv\.weight", _by_rules([])),
    (
        r"blocks\.0\.0\.attn\.qkv\.weight",
        _by_rules([(r"blocks\.\d+\.(\d+)\.(.+)", r"blocks.\1.\2")]),
    ),  # DINOv2's chunks
    (r"layers\.0\.attn\.qkv\.weight", _by_rules(_MM_VIT)),
    (r"encoder\.layers\.encoder_layer_0\.self_attention\.in_proj_weight", _by_rules(_TORCHVISION_VIT)),
    (r"encoder\.layer\.0\.attention\.attention\.qkv\.weight", _by_rules(_TRANSFORMERS_VIT)),
    (r"encoder\.stages\.0\.layers\.0\.layer\.0\.convolution\.weight", _transformers_resnet),
]
