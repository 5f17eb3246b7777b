"""Exports of vision transformers with registers, LayerScale, SwiGLU or rotary positions, to timm and transformers."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from sslrun.errors import UsageError
from sslrun.export.export import export
from sslrun.nn.library import imported as library
from test_export import encoder, require_same, transformer

FORM = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
DINOV2_FORMS = [
    {"layer_scale": 0.1, "positions": "learned"},
    {"layer_scale": 0.1, "positions": "learned", "registers": 4, "mask_token": True, "patch_tokens": True},
    {"mlp": "swiglu", "positions": "learned", "registers": 2},
    {"mlp": "swiglu", "layer_scale": 0.1, "mlp_ratio": 3.3},
]


@pytest.mark.needs("timm")
@pytest.mark.parametrize("options", [*DINOV2_FORMS, {"mask_token": True, "arch": "tiny"}])
def test_the_forms_of_dinov2_are_networks_of_timm(tmp_path, options):
    """Made by timm itself as the metadata say, and filled with the file."""
    is_plain = "arch" in options
    made = encoder(transformer(**({} if is_plain else FORM), **options), 224 if is_plain else 32)
    path = tmp_path / "x.safetensors"
    export(made, "timm", path)
    about = json.loads(safe_open(path, "pt").metadata()["sslrun"])
    name = about["architecture"]
    assert is_plain or ("reg4" in name, "giant" in name) == ("registers" in options, options.get("mlp") == "swiglu")
    theirs = library("timm").create_model(name, **about["model_args"]).eval()
    theirs.load_state_dict(load_file(path))
    require_same(made, lambda images: theirs(images))


def dinov2_of_transformers(x, t, config):
    """Dinov2Model and Dinov2WithRegistersModel, by the names in their files."""
    heads, e = config["num_attention_heads"], "embeddings."

    def affine(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + config["layer_norm_eps"]).sqrt()
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    side = config["patch_size"]
    place = f"{e}patch_embeddings.projection"
    x = F.conv2d(x, t[f"{place}.weight"], t[f"{place}.bias"], side).flatten(2).transpose(1, 2)
    x = torch.cat([t[f"{e}cls_token"].expand(len(x), -1, -1), x], 1) + t[f"{e}position_embeddings"]
    if "num_register_tokens" in config:
        x = torch.cat([x[:, :1], t[f"{e}register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
    for block in range(config["num_hidden_layers"]):
        p = f"encoder.layer.{block}."
        y = norm(x, f"{p}norm1")
        q, k, v = (affine(y, f"{p}attention.attention.{part}") for part in ("query", "key", "value"))
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        y = ((q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + affine(y.transpose(1, 2).flatten(2), f"{p}attention.output.dense") * t[f"{p}layer_scale1.lambda1"]
        y = norm(x, f"{p}norm2")
        if config["use_swiglu_ffn"]:
            first, second = affine(y, f"{p}mlp.weights_in").chunk(2, -1)
            y = affine(F.silu(first) * second, f"{p}mlp.weights_out")
        else:
            y = affine(F.gelu(affine(y, f"{p}mlp.fc1")), f"{p}mlp.fc2")
        x = x + y * t[f"{p}layer_scale2.lambda1"]
    return norm(x, "layernorm")[:, 0]


def dinov3_of_transformers(x, t, config):
    """DINOv3ViTModel, by the names in its file."""
    heads, side = config["num_attention_heads"], config["patch_size"]
    width = config["hidden_size"] // heads

    def affine(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + config["layer_norm_eps"]).sqrt()
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    x = F.conv2d(x, t["embeddings.patch_embeddings.weight"], t["embeddings.patch_embeddings.bias"], side)
    grid = x.shape[-2:]
    prefix = torch.cat([t["embeddings.cls_token"], t["embeddings.register_tokens"]], 1)
    x = torch.cat([prefix.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    frequencies = [config["rope_theta"] ** (-4 * j / width) for j in range(width // 4)]
    angles = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            places = [2 * (row + 0.5) / grid[0] - 1, 2 * (column + 0.5) / grid[1] - 1]
            angles.append([2 * math.pi * place * frequency for place in places for frequency in frequencies] * 2)
    angles = torch.tensor(angles)

    def turned(part):
        patches = part[:, :, prefix.shape[1] :]
        first, second = patches.chunk(2, -1)
        patches = patches * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
        return torch.cat([part[:, :, : prefix.shape[1]], patches], 2)

    for block in range(config["num_hidden_layers"]):
        p = f"layer.{block}."
        y = norm(x, f"{p}norm1")
        q, k, v = (affine(y, f"{p}attention.{part}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv")
        y = ((turned(q) @ turned(k).transpose(2, 3)) / math.sqrt(width)).softmax(-1) @ v
        x = x + affine(y.transpose(1, 2).flatten(2), f"{p}attention.o_proj") * t[f"{p}layer_scale1.lambda1"]
        y = norm(x, f"{p}norm2")
        if config["use_gated_mlp"]:
            assert config["hidden_act"] == "silu"
            y = F.silu(affine(y, f"{p}mlp.gate_proj")) * affine(y, f"{p}mlp.up_proj")
        else:
            y = F.gelu(affine(y, f"{p}mlp.up_proj"))
        x = x + affine(y, f"{p}mlp.down_proj") * t[f"{p}layer_scale2.lambda1"]
    return norm(x, "norm")[:, 0]


@pytest.mark.parametrize("options", DINOV2_FORMS)
def test_the_forms_of_dinov2_are_networks_of_transformers(tmp_path, options):
    made, path = encoder(transformer(**FORM, **options)), tmp_path / "folder"
    export(made, "huggingface", path)
    config, tensors = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    kind = "Dinov2WithRegistersModel" if "registers" in options else "Dinov2Model"
    assert config["architectures"] == [kind] and f'{kind}.from_pretrained("folder")' in (path / "README.md").read_text()
    assert tensors["embeddings.mask_token"].shape == (1, 24)
    require_same(made, lambda x: dinov2_of_transformers(x, tensors, config))


@pytest.mark.parametrize("options", [{"registers": 4, "layer_scale": 0.1, "norm_eps": 1e-5}, {"mlp": "swiglu"}])
def test_the_forms_of_dinov3_are_networks_of_transformers(tmp_path, options):
    made, path = encoder(transformer(**FORM, positions="rotary", **options)), tmp_path / "folder"
    pairs = 24 // 3 // 4
    made.backbone.rope_embed.periods.copy_(torch.tensor([100 ** (j / pairs) for j in range(pairs)]))
    assert export(made, "huggingface", path) is None
    config, tensors = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    assert tensors["embeddings.register_tokens"].shape == (1, options.get("registers", 0), 24)
    require_same(made, lambda x: dinov3_of_transformers(x, tensors, config))
    made.backbone.rope_embed.periods.mul_(1.001)
    assert export(made, "huggingface", tmp_path / "rounded") == (
        "its rotary periods are rounded, and transformers computes exact ones"
    )
    made.backbone.rope_embed.periods.mul_(1.1)
    with pytest.raises(UsageError, match="rotary periods are not those of DINOv3"):
        export(made, "huggingface", tmp_path / "other")
