"""Names and shapes of the tensors of torchvision's, timm's and transformers' networks: what exports must have.

They are written down from the papers and from published files, and do not look at our own modules, so that an error
there shows. The tests compare them with the networks of torchvision 0.29, timm 1.0 and transformers 4.57.
"""

from collections.abc import Sequence
from typing import Any

Shapes = dict[str, tuple[int, ...]]

RESNETS = {  # torchvision's and timm's name: depth, groups and width of a group in the first stage
    "resnet18": (18, 1, 64),
    "resnet34": (34, 1, 64),
    "resnet50": (50, 1, 64),
    "resnet101": (101, 1, 64),
    "resnet152": (152, 1, 64),
    "wide_resnet50_2": (50, 1, 128),
    "wide_resnet101_2": (101, 1, 128),
    "resnext50_32x4d": (50, 32, 4),
    "resnext101_32x8d": (101, 32, 8),
    "resnext101_64x4d": (101, 64, 4),
}
VITS = {  # timm's name: width, blocks, heads
    "vit_tiny_patch16_224": (192, 12, 3),
    "vit_small_patch16_224": (384, 12, 6),
    "vit_base_patch16_224": (768, 12, 12),
    "vit_large_patch16_224": (1024, 24, 16),
}
CLASSIFIERS = {"fc.weight", "fc.bias", "head.weight", "head.bias"}  # an encoder has no classifier
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def resnet(name: str) -> Shapes:
    """A ResNet of torchvision or timm, classifier included."""
    depth, groups, group_width = RESNETS[name]
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7), **_batch_norm("bn1", 64)}
    channels = 64
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        plane = 32 * 2**stage
        inner = plane * group_width // 64 * groups
        outputs = plane if depth < 50 else 4 * plane
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            if depth < 50:
                sizes = [(plane, channels, 3, 3), (plane, plane, 3, 3)]
            else:
                sizes = [(inner, channels, 1, 1), (inner, inner // groups, 3, 3), (outputs, inner, 1, 1)]
            for number, size in enumerate(sizes, start=1):
                shapes[f"{prefix}.conv{number}.weight"] = size
                shapes |= _batch_norm(f"{prefix}.bn{number}", size[0])
            if block == 0 and (stage > 1 or outputs != channels):
                shapes[f"{prefix}.downsample.0.weight"] = (outputs, channels, 1, 1)
                shapes |= _batch_norm(f"{prefix}.downsample.1", outputs)
            channels = outputs
    return shapes | {"fc.weight": (1000, channels), "fc.bias": (1000,)}


def vit(name: str) -> Shapes:
    """A vision transformer of timm, classifier included."""
    width, depth, _ = VITS[name]
    shapes: Shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + 14**2, width)}
    shapes |= _affine("patch_embed.proj", width, 3, 16, 16)
    for block in range(depth):
        for layer in ("norm1", "norm2"):
            shapes |= _affine(f"blocks.{block}.{layer}", width)
        for layer, sizes in {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }.items():
            shapes |= _affine(f"blocks.{block}.{layer}", *sizes)
    return shapes | _affine("norm", width) | _affine("head", 1000, width)


def timm_vit(arguments: dict[str, Any], is_gated: bool) -> Shapes:
    """A DINOv2 of timm that is made with these arguments, without classifier.

    Args:
        arguments: img_size, patch_size, embed_dim, depth, mlp_ratio; reg_tokens if it has registers, whose positions
            are among the others (no_embed_class = False). It has LayerScale.
        is_gated: whether its MLPs are SwiGLU, whose first layer has the matrices of gate and value.
    """
    width, patch, registers = arguments["embed_dim"], arguments["patch_size"], arguments.get("reg_tokens", 0)
    hidden = int(width * arguments["mlp_ratio"])
    places = 1 + registers + (arguments["img_size"] // patch) ** 2
    shapes: Shapes = {"cls_token": (1, 1, width), "pos_embed": (1, places, width)}
    shapes |= {"reg_token": (1, registers, width)} if registers else {}
    shapes |= _affine("patch_embed.proj", width, 3, patch, patch) | _affine("norm", width)
    for block in range(arguments["depth"]):
        place = f"blocks.{block}"
        for number in (1, 2):
            shapes |= _affine(f"{place}.norm{number}", width)
            shapes[f"{place}.ls{number}.gamma"] = (width,)
        shapes |= _affine(f"{place}.attn.qkv", 3 * width, width) | _affine(f"{place}.attn.proj", width, width)
        shapes |= _affine(f"{place}.mlp.fc1", hidden, width)
        shapes |= _affine(f"{place}.mlp.fc2", width, hidden // 2 if is_gated else hidden)
    return shapes


def transformers_resnet(config: dict[str, Any]) -> Shapes:
    """The file of a ResNetModel with this config.json."""
    widths: Sequence[int] = config["hidden_sizes"]
    channels, stem = config["embedding_size"], "embedder.embedder"
    shapes: Shapes = {f"{stem}.convolution.weight": (channels, config["num_channels"], 7, 7)}
    shapes |= _batch_norm(f"{stem}.normalization", channels)
    for stage, (blocks, outputs) in enumerate(zip(config["depths"], widths, strict=True)):
        for block in range(blocks):
            prefix = f"encoder.stages.{stage}.layers.{block}"
            if config["layer_type"] == "basic":
                sizes = [(outputs, channels, 3, 3), (outputs, outputs, 3, 3)]
            else:
                inner = outputs // 4
                sizes = [(inner, channels, 1, 1), (inner, inner, 3, 3), (outputs, inner, 1, 1)]
            layers = {f"layer.{number}": size for number, size in enumerate(sizes)}
            if block == 0 and (stage > 0 or outputs != channels):
                layers["shortcut"] = (outputs, channels, 1, 1)
            for layer, size in layers.items():
                shapes[f"{prefix}.{layer}.convolution.weight"] = size
                shapes |= _batch_norm(f"{prefix}.{layer}.normalization", size[0])
            channels = outputs
    return shapes


def transformers_vit(config: dict[str, Any]) -> Shapes:
    """The file of a ViTModel without pooler, with this config.json."""
    width, hidden, patch = (config[key] for key in ("hidden_size", "intermediate_size", "patch_size"))
    places = 1 + (config["image_size"] // patch) ** 2
    shapes: Shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, places, width),
        **_affine("embeddings.patch_embeddings.projection", width, config["num_channels"], patch, patch),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            shapes |= _affine(f"{prefix}.attention.attention.{part}", width, width)
        shapes |= _affine(f"{prefix}.attention.output.dense", width, width)
        shapes |= _affine(f"{prefix}.layernorm_before", width) | _affine(f"{prefix}.layernorm_after", width)
        shapes |= _affine(f"{prefix}.intermediate.dense", hidden, width)
        shapes |= _affine(f"{prefix}.output.dense", width, hidden)
    return shapes | _affine("layernorm", width)


def _affine(prefix: str, outputs: int, *inputs: int) -> Shapes:
    return {f"{prefix}.weight": (outputs, *inputs), f"{prefix}.bias": (outputs,)}


def _batch_norm(prefix: str, channels: int) -> Shapes:
    running = {f"{prefix}.running_mean": (channels,), f"{prefix}.running_var": (channels,)}
    return {**_affine(prefix, channels), **running, f"{prefix}.num_batches_tracked": ()}
