"""The vision transformer: timm's names and counts, MoCo v3's initial values."""

import math

import pytest
import torch
from torch import nn

from sslrun.nn.vit import VisionTransformer, sine_cosine_positions

# timm's vit_{tiny,small,base,large}_patch16_224 without head (1000 classes); the heads' number changes nothing.
PARAMETERS = {"tiny": 5_717_416, "small": 22_050_664, "base": 86_567_656, "large": 304_326_632}


@pytest.mark.parametrize("arch", PARAMETERS)
def test_parameter_count_is_timms(arch):
    with torch.device("meta"):
        model = VisionTransformer(arch)
    classifier = 1000 * model.num_features + 1000
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[arch] - classifier


def test_names_are_timms():
    with torch.device("meta"):
        names = set(VisionTransformer("tiny", depth=1).state_dict())
    block = [f"{layer}.{kind}" for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for kind in ("weight", "bias")]  # fmt: skip
    outside = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"]
    assert names == {*outside, *(f"blocks.0.{name}" for name in block)}


def test_equals_torchs_own_encoder():
    """The blocks, against torch.nn.TransformerEncoderLayer with the same weights."""
    torch.manual_seed(0)
    model = VisionTransformer("tiny", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    pixels = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(3, 16, -1)
    projection = model.patch_embed.proj
    tokens = pixels @ projection.weight.reshape(24, -1).T + projection.bias
    x = torch.cat([model.cls_token.expand(3, -1, -1), tokens], dim=1) + model.pos_embed
    for block in model.blocks:
        twin = nn.TransformerEncoderLayer(
            24, 3, 96, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        ).double()
        twin.load_state_dict({
            "self_attn.in_proj_weight": block.attn.qkv.weight, "self_attn.in_proj_bias": block.attn.qkv.bias,
            "self_attn.out_proj.weight": block.attn.proj.weight, "self_attn.out_proj.bias": block.attn.proj.bias,
            "linear1.weight": block.mlp.fc1.weight, "linear1.bias": block.mlp.fc1.bias,
            "linear2.weight": block.mlp.fc2.weight, "linear2.bias": block.mlp.fc2.bias,
            "norm1.weight": block.norm1.weight, "norm1.bias": block.norm1.bias,
            "norm2.weight": block.norm2.weight, "norm2.bias": block.norm2.bias,
        })  # fmt: skip
        x = twin(x)
    torch.testing.assert_close(model(images), [model.norm(x)[:, 0]])


def test_positions_are_sines_and_cosines_of_columns_then_rows():
    table = sine_cosine_positions(grid=3, width=16)[0]
    assert table.shape == (10, 16) and not table[0].any()
    for row in range(3):
        for column in range(3):
            for k in range(4):
                frequency = 10000.0 ** (-k / 4)
                expected = [math.sin(column * frequency), math.cos(column * frequency)]
                expected += [math.sin(row * frequency), math.cos(row * frequency)]
                found = table[1 + 3 * row + column, [k, 4 + k, 8 + k, 12 + k]]
                torch.testing.assert_close(found, torch.tensor(expected))


def test_initial_values_and_what_is_frozen():
    torch.manual_seed(0)
    model = VisionTransformer("tiny", img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=4)
    bounds = {
        "patch_embed.proj.weight": math.sqrt(6 / (3 * 64 + 64)),
        "blocks.0.attn.qkv.weight": math.sqrt(6 / (64 + 64)),  # three square matrices, not one of 64 x 192
        "blocks.0.mlp.fc1.weight": math.sqrt(6 / (64 + 256)),
    }
    for name, bound in bounds.items():
        weight = model.get_parameter(name)
        assert 0.95 * bound < float(weight.detach().abs().max()) <= bound, name
        assert float(weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05), name
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert VisionTransformer("tiny", depth=1, frozen_patch_embed=False).patch_embed.proj.weight.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 30, "patch_size": 8}, "patch_size is 8, which does not divide img_size 30"),
        ({"embed_dim": 30, "num_heads": 3}, "embed_dim is 30, expected a multiple of 4 and of num_heads, 3"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer("tiny", depth=1, **arguments)
