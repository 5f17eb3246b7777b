"""Vision transformers with registers, LayerScale, SwiGLU or rotary positions, as timm's and transformers' networks.

With added positions they are DINOv2's in both libraries (Oquab et al. 2023, arXiv 2304.07193; registers: Darcet et al.
2024, arXiv 2309.16588), with rotary ones DINOv3's in transformers (Simeoni et al. 2025, arXiv 2508.10104). What a
library always has and ours has not is written with the value that changes nothing: a LayerScale of 1, a mask token of
0, a position of 0 for registers. A mask token of ours is written if the library has one, and left out otherwise.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sslrun.errors import UsageError
from sslrun.export.architecture import Shapes, VitArchitecture
from sslrun.export.encoder import ELSEWHERE

PERIODS = "rope_embed.periods"
_PERIODS_TOLERANCE = 1e-2  # of periods that were stored in bfloat16

_DINOV2 = [
    (r"cls_token", r"embeddings.cls_token"),
    (r"mask_token", r"embeddings.mask_token"),
    (r"reg_token", r"embeddings.register_tokens"),
    (r"pos_embed", r"embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embeddings.projection.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(\w+)", r"encoder.layer.\1.norm\2.\3"),
    (r"blocks\.(\d+)\.ls([12])\.gamma", r"encoder.layer.\1.layer_scale\2.lambda1"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layer.\1.attention.output.dense.\2"),
    (r"norm\.(\w+)", r"layernorm.\1"),
]
_DINOV3 = [
    (r"(cls_token|mask_token)", r"embeddings.\1"),
    (r"reg_token", r"embeddings.register_tokens"),
    (r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embeddings.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(\w+)", r"layer.\1.norm\2.\3"),
    (r"blocks\.(\d+)\.ls([12])\.gamma", r"layer.\1.layer_scale\2.lambda1"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"layer.\1.attention.o_proj.\2"),
    (r"norm\.(\w+)", r"norm.\1"),
]


def hidden_width(architecture: VitArchitecture) -> int:
    """Numbers between the two layers of an MLP; with SwiGLU after the product."""
    hidden = int(architecture.embed_dim * architecture.mlp_ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if architecture.mlp == "swiglu" else hidden


# --- timm ------------------------------------------------------------------------------------------------------------


def timm_form(architecture: VitArchitecture) -> tuple[str, dict[str, Any]]:
    """The name of timm's network, and the arguments that make it the encoder's.

    Raises:
        UsageError: timm would compute something else.
    """
    if architecture.positions == "rotary":
        raise UsageError(f"timm's networks with rotary positions have no bias of keys, as ours has: {ELSEWHERE}")
    if architecture.norm_eps != 1e-6:
        wrong = f"timm's DINOv2 adds 1e-06 to the variance in its norms, and this one {architecture.norm_eps:g}"
        raise UsageError(f"{wrong}: {ELSEWHERE}")
    is_gated = architecture.mlp == "swiglu"
    size = architecture.arch if architecture.arch in ("small", "base", "large") else "small"
    name = f"vit_{'giant' if is_gated else size}_patch14_{'reg4_' if architecture.registers else ''}dinov2"
    hidden, width = hidden_width(architecture) * (2 if is_gated else 1), architecture.embed_dim
    ratio = hidden / width
    return name, {
        "num_classes": 0,
        "img_size": architecture.img_size,
        "patch_size": architecture.patch_size,
        "embed_dim": width,
        "depth": architecture.depth,
        "num_heads": architecture.num_heads,
        "mlp_ratio": ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
        "init_values": architecture.layer_scale or 1.0,  # it ignores None
        **({"reg_tokens": architecture.registers, "no_embed_class": False} if architecture.registers else {}),
    }


def to_timm(tensors: Mapping[str, Tensor], architecture: VitArchitecture) -> dict[str, Tensor]:
    """Our tensors as in timm: positions have a place for each register."""
    theirs = {name: tensor for name, tensor in tensors.items() if name != "mask_token"}
    if not architecture.is_plain:
        theirs = _layer_scales(architecture) | theirs
    if (registers := tensors.get("reg_token")) is not None:
        positions = tensors["pos_embed"]
        theirs["pos_embed"] = torch.cat([positions[:, :1], torch.zeros_like(registers), positions[:, 1:]], dim=1)
    return theirs


def from_timm(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_timm`; `own` are the encoder's tensors, for their names and a mask token."""
    ours = {name: tensors.get(name, tensor) for name, tensor in own.items()}
    if (registers := tensors.get("reg_token")) is not None:
        first, _, rest = tensors["pos_embed"].split([1, registers.shape[1], own["pos_embed"].shape[1] - 1], dim=1)
        ours["pos_embed"] = torch.cat([first, rest], dim=1)
    return ours


# --- transformers ----------------------------------------------------------------------------------------------------


def transformers_config(architecture: VitArchitecture) -> dict[str, Any]:
    """config.json of a Dinov2Model, Dinov2WithRegistersModel or DINOv3ViTModel, without what all networks have.

    Raises:
        UsageError: transformers would compute something else.
    """
    common = {
        "hidden_size": architecture.embed_dim,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": architecture.num_heads,
        "image_size": architecture.img_size,
        "patch_size": architecture.patch_size,
        "layerscale_value": architecture.layer_scale or 1.0,
        "layer_norm_eps": architecture.norm_eps,
        "drop_path_rate": 0.0,
    }
    is_gated = architecture.mlp == "swiglu"
    if architecture.positions == "rotary":
        return {
            "architectures": ["DINOv3ViTModel"],
            "model_type": "dinov3_vit",
            **common,
            "intermediate_size": hidden_width(architecture),
            "hidden_act": "silu" if is_gated else "gelu",
            "use_gated_mlp": is_gated,
            "num_register_tokens": architecture.registers,
            "query_bias": True,
            "key_bias": True,
            "value_bias": True,
            "rope_theta": 100.0,
            "pos_embed_rescale": None,
        }
    registers = {"num_register_tokens": architecture.registers} if architecture.registers else {"use_mask_token": True}
    return {
        "architectures": ["Dinov2WithRegistersModel" if architecture.registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if architecture.registers else "dinov2",
        **common,
        **registers,
        "mlp_ratio": architecture.mlp_ratio,
        "hidden_act": "gelu",
        "use_swiglu_ffn": is_gated,
        "qkv_bias": True,
    }


def to_transformers_form(tensors: Mapping[str, Tensor], architecture: VitArchitecture) -> dict[str, Tensor]:
    """Our tensors by the names of the network that `transformers_config` names."""
    is_v3, width = architecture.positions == "rotary", architecture.embed_dim
    added = {"mask_token": torch.zeros(1, width)}
    if is_v3:
        added["reg_token"] = torch.zeros(1, 0, width)
    theirs: dict[str, Tensor] = {}
    for name, tensor in {**added, **_layer_scales(architecture), **tensors}.items():
        if name != PERIODS:
            names = _in_transformers(name, architecture)
            parts = tensor.chunk(len(names)) if len(names) > 1 else [tensor]
            theirs |= zip(names, parts, strict=True)
    if is_v3:
        theirs["embeddings.mask_token"] = theirs["embeddings.mask_token"].view(1, 1, width)
    return theirs


def from_transformers_form(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], architecture: VitArchitecture
) -> dict[str, Tensor]:
    """The inverse of `to_transformers_form`, for the names and shapes of `own`, the encoder's tensors."""
    ours: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if name == PERIODS:
            ours[name] = tensor
            continue
        parts = [tensors[part] for part in _in_transformers(name, architecture)]
        ours[name] = (torch.cat(parts) if len(parts) > 1 else parts[0]).view(tensor.shape)
    return ours


def transformers_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes in the file of a network with this config.json, as transformers has them."""
    width, is_v3 = config["hidden_size"], config["model_type"] == "dinov3_vit"
    patch = (width, config["num_channels"], config["patch_size"], config["patch_size"])
    shapes: Shapes = {"embeddings.cls_token": (1, 1, width)}
    if is_v3:
        hidden, is_gated, layer = config["intermediate_size"], config["use_gated_mlp"], "layer"
        attention = {part: f"attention.{part}_proj" for part in "qkvo"}
        mlp = {"up_proj": (hidden, width), "down_proj": (width, hidden)}
        mlp |= {"gate_proj": (hidden, width)} if is_gated else {}
        shapes |= {"embeddings.mask_token": (1, 1, width)}
        shapes |= {"embeddings.register_tokens": (1, config["num_register_tokens"], width)}
        shapes |= _affine("embeddings.patch_embeddings", *patch) | _affine("norm", width)
    else:
        hidden, layer = int(width * config["mlp_ratio"]), "encoder.layer"
        parts = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "output.dense"}
        attention = {part: f"attention.{name}" for part, name in parts.items()}
        mlp = {"fc1": (hidden, width), "fc2": (width, hidden)}
        if config["use_swiglu_ffn"]:
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
            mlp = {"weights_in": (2 * hidden, width), "weights_out": (width, hidden)}
        places = 1 + (config["image_size"] // config["patch_size"]) ** 2
        shapes |= {"embeddings.mask_token": (1, width), "embeddings.position_embeddings": (1, places, width)}
        if "num_register_tokens" in config:
            shapes["embeddings.register_tokens"] = (1, config["num_register_tokens"], width)
        shapes |= _affine("embeddings.patch_embeddings.projection", *patch) | _affine("layernorm", width)
    for block in range(config["num_hidden_layers"]):
        place = f"{layer}.{block}"
        for number in (1, 2):
            shapes |= _affine(f"{place}.norm{number}", width)
            shapes[f"{place}.layer_scale{number}.lambda1"] = (width,)
        for name in attention.values():
            shapes |= _affine(f"{place}.{name}", width, width)
        for name, size in mlp.items():
            shapes |= _affine(f"{place}.mlp.{name}", *size)
    return shapes


def periods_note(architecture: VitArchitecture, tensors: Mapping[str, Tensor]) -> str | None:
    """What is to be said of rotary periods that are not those that transformers computes.

    Raises:
        UsageError: they differ by more than rounding.
    """
    if (periods := tensors.get(PERIODS)) is None:
        return None
    pairs = architecture.embed_dim // architecture.num_heads // 4
    exact = torch.tensor([100 ** (j / pairs) for j in range(pairs)], dtype=torch.float64)
    error = ((periods.double() - exact) / exact).abs().max().item()
    if error > _PERIODS_TOLERANCE:
        raise UsageError(f"its rotary periods are not those of DINOv3, which transformers computes: {ELSEWHERE}")
    is_rounded = error > 1e-6
    return "its rotary periods are rounded, and transformers computes exact ones" if is_rounded else None


def _layer_scales(architecture: VitArchitecture) -> dict[str, Tensor]:
    """By our names, factors that change nothing."""
    ones, blocks = torch.ones(architecture.embed_dim), range(architecture.depth)
    return {f"blocks.{block}.ls{number}.gamma": ones.clone() for block in blocks for number in (1, 2)}


def _in_transformers(name: str, architecture: VitArchitecture) -> list[str]:
    """The names of one of our tensors; several if it is joined from them."""
    is_v3 = architecture.positions == "rotary"
    if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name):
        if is_v3:
            return [f"layer.{match[1]}.attention.{part}_proj.{match[2]}" for part in "qkv"]
        return [f"encoder.layer.{match[1]}.attention.attention.{part}.{match[2]}" for part in ("query", "key", "value")]
    if match := re.fullmatch(r"blocks\.(\d+)\.mlp\.fc([12])\.(\w+)", name):
        is_gated, is_first = architecture.mlp == "swiglu", match[2] == "1"
        if is_v3:
            first = ["gate_proj", "up_proj"] if is_gated else ["up_proj"]
            return [f"layer.{match[1]}.mlp.{part}.{match[3]}" for part in (first if is_first else ["down_proj"])]
        part = ("weights_in" if is_first else "weights_out") if is_gated else f"fc{match[2]}"
        return [f"encoder.layer.{match[1]}.mlp.{part}.{match[3]}"]
    for pattern, theirs in _DINOV3 if is_v3 else _DINOV2:
        if match := re.fullmatch(pattern, name):
            return [match.expand(theirs)]
    raise AssertionError(f"{name} has no name in transformers")


def _affine(prefix: str, outputs: int, *inputs: int) -> Shapes:
    return {f"{prefix}.weight": (outputs, *inputs), f"{prefix}.bias": (outputs,)}
